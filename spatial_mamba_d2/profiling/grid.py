"""Where plain PyTorch is faster than ours: ratios of their times over a grid of settings.

Each subject (:mod:`.grid_candidates`) is compared with plain PyTorch for all combinations of step,
dtype, number of threads, batch and size. The two take turns, and a ratio is the median over the
rounds, so that a disturbance of the machine affects both alike. Fast calls get more rounds.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.profiling.benchmark import describe_machine
from spatial_mamba_d2.profiling.candidates import TOLERANCE, check_agreement
from spatial_mamba_d2.profiling.grid_candidates import (
    FORWARD,
    SUBJECTS,
    TRAINING,
    Outputs,
    Pair,
    Setting,
    Subject,
)
from spatial_mamba_d2.profiling.timing import call_seconds
from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.tables import markdown_table

THREADS = (1, 2, 4)
BATCHES = (1, 2, 8)
SIZES = ((32, 32), (64, 96), (224, 224), (640, 896))
DTYPES = (torch.float32, torch.bfloat16)
#: Above this ratio, plain PyTorch is faster; below, the difference may be noise.
LIMIT = 1.02
_BUDGET_S = 0.06  # of the rounds of a setting
_ROUND_S = 0.001  # at least, of a round
_MIN_ROUNDS, _MAX_ROUNDS = 3, 25
_GRADIENT_TOLERANCE = 1e-3  # in float32; those of parameters are sums over all tokens
_CONFIRMATION = 3  # times as many rounds, where plain PyTorch seems to be faster


def run_grid(
    threads: Sequence[int] | None = None,
    batches: Sequence[int] = BATCHES,
    sizes: Sequence[tuple[int, int]] = SIZES,
    subjects: Sequence[Subject] = SUBJECTS,
    keep_memory: bool = False,
) -> dict[str, Any]:
    """Check that results agree, then time ours and plain PyTorch, for all settings.

    Args:
        threads: numbers of threads, by default those of ``THREADS`` that the machine has.
        batches: images per call.
        sizes: heights and widths of the images in pixels.
        subjects: what is compared.
        keep_memory: call :func:`.allocator.keep_freed_memory` first.

    Returns:
        a dictionary with ``machine``, ``task`` and ``settings``, a list of dictionaries with
        ``subject``, the fields of :class:`.grid_candidates.Setting`, ``ratio`` (ours / plain, by
        time), ``rounds`` and the medians ``ours_s`` and ``plain_s``.

    Raises:
        ValueError: a number below 1.
        RuntimeError: there are no compiled kernels, or the results of ours and plain PyTorch
            differ.
    """
    threads = threads or [n for n in THREADS if n <= _num_cores()]
    for name, values in {"threads": threads, "batches": batches, "sizes": sum(sizes, ())}.items():
        if min(values) < 1:
            raise ValueError(f"{name} must be at least 1, got {min(values)}")
    if reason := _extension.WHY_NOT_COMPILED:
        raise RuntimeError(f"the grid compares compiled kernels, but there are none: {reason}")
    kept = keep_memory and keep_freed_memory()
    torch.manual_seed(0)
    threads_before = torch.get_num_threads()
    try:
        found = [
            {"subject": subject.name, **_described(setting), **_measured(subject, setting)}
            for subject, setting in _settings(subjects, threads, batches, sizes)
        ]
    finally:
        torch.set_num_threads(threads_before)
    return {
        "machine": {**describe_machine(), "threads": " or ".join(map(str, threads))},
        "task": "grid: seconds of ours / of plain PyTorch, medians of interleaved rounds, "
        f"freed memory {'kept' if kept else 'given back'}",
        "settings": found,
    }


def _num_cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _settings(
    subjects: Sequence[Subject],
    threads: Sequence[int],
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int]],
) -> Iterator[tuple[Subject, Setting]]:
    for values in itertools.product(subjects, (FORWARD, TRAINING), DTYPES, threads, batches, sizes):
        subject, step, dtype, num_threads, batch, (height, width) = values
        setting = Setting(step, dtype, num_threads, batch, height, width)
        if setting.num_pixels <= subject.max_pixels.get(step, 0):
            yield subject, setting


def _described(setting: Setting) -> dict[str, Any]:
    return {**vars(setting), "dtype": str(setting.dtype).removeprefix("torch.")}


def _measured(subject: Subject, setting: Setting) -> dict[str, Any]:
    torch.set_num_threads(setting.threads)
    pair = subject.build(setting)
    tolerance = TOLERANCE[setting.dtype]
    if setting.step == TRAINING:
        tolerance = max(tolerance, _GRADIENT_TOLERANCE)
    _check(pair, f"{subject.name}, {setting}", tolerance)
    result = _compare(pair, 1)
    return _compare(pair, _CONFIRMATION) if result["ratio"] > LIMIT else result


def _check(pair: Pair, name: str, tolerance: float) -> None:
    def tensors(outputs: Outputs) -> tuple[torch.Tensor, ...]:
        return outputs if isinstance(outputs, tuple) else (outputs,)

    ours, plain = (tensors(call()) for call in pair)
    for i, (x, y) in enumerate(zip(ours, plain, strict=True)):
        outputs = {f"plain PyTorch's output {i}": y.float(), f"{name}: output {i}": x.float()}
        check_agreement(outputs, tolerance)


def _compare(pair: Pair, more: int) -> dict[str, Any]:
    """Times in turns, with ``more`` times as many rounds as usual."""
    once_s = sum(map(call_seconds, pair))
    num_calls = max(1, round(_ROUND_S / once_s))
    usual = min(max(int(_BUDGET_S / (once_s * num_calls)), _MIN_ROUNDS), _MAX_ROUNDS)
    rounds = []
    for i in range(usual * more):
        order = (0, 1) if i % 2 else (1, 0)
        times = {k: call_seconds(pair[k], num_calls=num_calls) for k in order}
        rounds.append((times[0], times[1]))
    ours_s, plain_s = map(statistics.median, zip(*rounds, strict=True))
    ratio = statistics.median(ours / plain for ours, plain in rounds)
    return {"ratio": ratio, "rounds": len(rounds), "ours_s": ours_s, "plain_s": plain_s}


def grid_table(settings: Sequence[dict[str, Any]]) -> str:
    """Ratios, a column for each batch and size; then the worst, and where plain is faster."""
    columns = list(dict.fromkeys(map(_column, settings)))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for found in settings:
        mark = "**" if found["ratio"] > LIMIT else ""
        key = (found["subject"], found["step"], found["dtype"], str(found["threads"]))
        rows.setdefault(key, {})[_column(found)] = f"{mark}{found['ratio']:.2f}{mark}"
    table = markdown_table(
        ["", "step", "dtype", "threads", *columns],
        [[*key, *(cells.get(column, "") for column in columns)] for key, cells in rows.items()],
    )
    worst = max(settings, key=lambda found: found["ratio"])
    slower = sum(found["ratio"] > LIMIT for found in settings)
    return (
        f"{table}\n\nWorst: {worst['ratio']:.2f}, {worst['subject']}, {worst['step']}, "
        f"{worst['dtype']}, {worst['threads']} threads, {_column(worst)}: {worst['ours_s']:.2e} s, "
        f"plain PyTorch {worst['plain_s']:.2e} s.\n"
        f"Plain PyTorch is faster (ratio above {LIMIT}) in {slower} of {len(settings)} settings."
    )


def _column(found: dict[str, Any]) -> str:
    return f"{found['batch']} x {found['height']} x {found['width']}"
