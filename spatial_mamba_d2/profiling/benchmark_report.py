"""A benchmark's result as a table, a plot and files; :mod:`.benchmark` measures it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.profiling.benchmark import run_benchmark
from spatial_mamba_d2.profiling.candidates import is_float32
from spatial_mamba_d2.profiling.grid import grid_table, run_grid
from spatial_mamba_d2.system.processor import in_words
from spatial_mamba_d2.system.tables import markdown_table

#: the task that :func:`.run_grid` does
GRID = "grid"

logger = logging.getLogger(__name__)


def report(
    task: str,
    height: int,
    width: int,
    *,
    output: Path,
    threads: Iterable[int | None] = (None,),
    batch: int = 1,
    rounds: int = 7,
    device: str = "cpu",
    compile: bool = False,
    openvino: bool = False,
    keep_memory: bool = False,
) -> None:
    """Run once for each of ``threads``, print a table, and save it with all figures.

    They are in ``output``/benchmark_*.{md,json,png}. See :func:`.run_benchmark` for the others. The
    task ``"grid"`` is :func:`.run_grid`, one run for all ``threads``, with sizes, batches and
    rounds of its own.
    """
    check_outputs([output / "benchmark.md"], [], overwrite=True)
    if task == GRID:
        if device != "cpu":
            raise ValueError(f"device must be cpu for the task grid, got {device!r}")
        result = run_grid([n for n in threads if n is not None], keep_memory=keep_memory)
        _save(result, str(output / "benchmark_grid"))
        return
    for num_threads in threads:
        result = run_benchmark(
            task, height, width, batch, rounds, num_threads, device, compile,
            openvino, keep_memory=keep_memory,
        )  # fmt: skip
        size = f"_{batch}" if task == "growth" else f"_{batch}x{height}x{width}"
        on_device = "" if device == "cpu" else f"_{device}"
        on_threads = f"_{num_threads}threads" if num_threads else ""
        stem = str(output / f"benchmark_{task}{size}{on_device}{on_threads}")
        _save(result, stem)
        try:
            plot(result, Path(stem + ".png"))
        except ImportError:
            logger.info("no plot, because matplotlib is not installed")


def _save(result: dict[str, Any], stem: str) -> None:
    table = to_markdown(result)
    print(table)
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    Path(stem + ".json").write_text(json.dumps(result, indent=2))
    Path(stem + ".md").write_text(table + "\n")


def to_markdown(result: dict[str, Any]) -> str:
    """A table of the result, with ratios to the fastest of ours in float32."""
    machine = result["machine"]
    title = (
        f"{result['task']}; on {machine['device']}; {in_words(machine)}, PyTorch {machine['torch']}"
    )
    if "settings" in result:
        table = grid_table(result["settings"])
    else:
        table = _growth_table(result) if "exponent" in result else _table(result)
    return f"{title}\n\n{table}"


def _table(result: dict[str, Any]) -> str:
    best = min(
        seconds
        for name, seconds in result["seconds"].items()
        if name.startswith("ours") and is_float32(name)
    )
    fraction = result.get("peak_fraction", {})
    rows = [
        [
            name,
            f"{seconds:.4f}",
            "{:.4f} to {:.4f}".format(*result["spread"][name]),
            f"{seconds / best:.2f}",
            _cell(result["memory_mb"].get(name), ".0f"),
            _cell(fraction.get(name), ".2f"),
        ]
        for name, seconds in result["seconds"].items()
    ]
    return markdown_table(
        ["", "median s", "least to most", "relative", "MB", "of the GEMM peak"], rows
    )


def _growth_table(result: dict[str, Any]) -> str:
    pixels = list(next(iter(result["seconds"].values())))
    rows = [
        [
            name,
            *(f"{s:.4f}" for s in seconds.values()),
            f"{result['exponent'][name]:.2f}",
            _cell(result["memory_mb"].get(name, {}).get(pixels[-1]), ".0f"),
        ]
        for name, seconds in result["seconds"].items()
    ]
    sides = [f"{math.isqrt(p)}^2: s" for p in pixels]
    return markdown_table(["", *sides, "exponent", "MB at the largest"], rows)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of seconds with their spread, or lines of seconds over pixels; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    if "exponent" in result:
        for name, row in result["seconds"].items():
            label = f"{name} ({result['exponent'][name]:.2f})"
            axes.loglog(list(row), list(row.values()), marker="o", label=label)
        axes.set(xlabel="pixels", ylabel="seconds")
        axes.legend(fontsize="small")
    else:
        names, seconds = zip(*result["seconds"].items(), strict=True)
        limits = [result["spread"][name] for name in names]
        errors = [[s - least for s, (least, _) in zip(seconds, limits, strict=True)],
                  [most - s for s, (_, most) in zip(seconds, limits, strict=True)]]  # fmt: skip
        axes.barh(names, seconds, xerr=errors)
        axes.invert_yaxis()
        axes.set(xlabel="seconds, median; whiskers: least and most")
    axes.set_title(result["task"], fontsize="small")
    figure.savefig(path, dpi=120)
