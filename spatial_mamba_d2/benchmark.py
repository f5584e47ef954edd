"""Latency of the operators and backbones, ours and timm's, compared in one run.

Results are checked before they are timed; candidates take turns, and the medians over the rounds
are reported, so that a disturbance of the machine meets all of them alike.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from spatial_mamba_d2.models import build_backbone
from spatial_mamba_d2.ops import _extension, structure_aware_ssm

PEERS = {
    "timm swin_tiny": "swin_tiny_patch4_window7_224",
    "timm convnext_tiny": "convnext_tiny",
    "timm mambaout_tiny": "mambaout_tiny",
}
NATIVE, EAGER = "ours, compiled operators", "ours, plain PyTorch operators"
TASKS = ("op", "backbone", "train")
DEVICES = ("cpu", "cuda")
Candidates = dict[str, Callable[[], Any]]


def run_benchmark(
    task: str,
    height: int,
    width: int,
    batch: int = 1,
    rounds: int = 7,
    threads: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Check, then time one task in float32.

    Args:
        task: ``"op"``: the fused operator on a map of a quarter of the image's size with 128
            channels, forward and backward; ``"backbone"``: the four feature maps, forward;
            ``"train"``: forward and backward of the same.
        height, width: of the image in pixels.
        batch: images.
        rounds: turns of each candidate.
        threads: of PyTorch; ``None`` leaves them.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        a dictionary with ``machine``, ``task``, ``seconds`` (median of each candidate) and
        ``spread`` (least and most of each).

    Raises:
        ValueError: no such task, a size below 1, or a device that is not there.
        RuntimeError: the results of two candidates that must agree do not.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    for name, value in {"height": height, "width": width, "batch": batch, "rounds": rounds}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        there = DEVICES if torch.cuda.is_available() else DEVICES[:1]
        raise ValueError(f"device must be one of {', '.join(there)} here, got {device!r}")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.device(device):
        if task == "op":
            candidates = _operator_candidates(batch, height // 4 or 1, width // 4 or 1, 128)
        else:
            candidates = _backbone_candidates(batch, height, width, train=task == "train")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):  # the first one warms up
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {
        "machine": describe_machine(device),
        "task": f"{task}, batch {batch}, {height} x {width} pixels, float32, "
        f"median of {rounds} interleaved rounds",
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: (min(values), max(values)) for name, values in times.items()},
    }


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads, instruction set, GPU and versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "operators": _extension.status(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


@contextmanager
def _kernels(name: str):
    with ExitStack() as stack:
        if name == EAGER:
            stack.enter_context(_extension.without_compiled_kernels())
        yield


def _ours() -> list[str]:
    on_cuda = torch.get_default_device().type == "cuda"
    why_not = _extension.WHY_NO_CUDA if on_cuda else _extension.WHY_NOT_COMPILED
    return [EAGER] if why_not else [NATIVE, EAGER]


def _served_by(kernels: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with _kernels(kernels):
            return function()

    return call


def _check(outputs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    first, *others = outputs.items()
    for name, value in others:
        error = ((value - first[1]).abs().max() / first[1].abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(
                f"{name} differs from {first[0]} by {error:.1e} of the largest value"
            )


def _operator_candidates(batch: int, height: int, width: int, dim: int) -> Candidates:
    u, delta = torch.randn(2, batch, height, width, dim)
    B, C = torch.randn(2, batch, height, width)
    A, D, bias = -torch.rand(dim), torch.randn(dim), torch.randn(dim) - 3
    inputs = [u, delta, A, B, C, D, bias, 0.2 * torch.randn(25, dim)]
    leaves = [x.requires_grad_() for x in map(torch.clone, inputs)]
    cotangent = torch.randn_like(u)

    def forward() -> Tensor:
        with torch.no_grad():
            return structure_aware_ssm(*inputs)

    def backward() -> Tensor:
        return torch.autograd.grad(structure_aware_ssm(*leaves), leaves, cotangent)[0]

    candidates: Candidates = {}
    for part, function in (("forward", forward), ("forward and backward", backward)):
        named = {f"{name}: {part}": _served_by(name, function) for name in _ours()}
        _check({name: candidate() for name, candidate in named.items()})
        candidates |= named
    return {**candidates, "one copy of u": u.clone}


def _backbone_candidates(batch: int, height: int, width: int, train: bool) -> Candidates:
    image = torch.randn(batch, 3, height, width)
    ours = build_backbone("tiny").train(train)
    models: dict[str, nn.Module] = {}
    for name, timm_name in PEERS.items():
        size: dict[str, Any] = {"img_size": (height, width)} if "swin" in timm_name else {}
        models[name] = timm.create_model(timm_name, features_only=True, **size).train(train)

    def call(model: nn.Module) -> Callable[[], Any]:
        def forward() -> Any:
            with torch.no_grad():
                return model(image)

        def step() -> None:
            model.zero_grad()
            outputs = model(image)
            outputs = outputs.values() if isinstance(outputs, dict) else outputs
            sum(output.mean() for output in outputs).backward()

        return step if train else forward

    ours.eval()
    with torch.no_grad():
        _check({n: _served_by(n, lambda: ours(image)["res5"])() for n in _ours()})
    ours.train(train)
    candidates = {name: _served_by(name, call(ours)) for name in _ours()}
    return candidates | {name: call(model) for name, model in models.items()}


def to_markdown(result: dict[str, Any]) -> str:
    """A table of the result, the fastest of ours first, with ratios to it."""
    best = min(seconds for name, seconds in result["seconds"].items() if name.startswith("ours"))
    lines = [
        f"{result['task']}; on {result['machine']['device']}; {result['machine']['processor']}, "
        f"{result['machine']['threads']} threads, {result['machine']['capability']}, "
        f"PyTorch {result['machine']['torch']}",
        "",
        "| | median s | least to most | relative |",
        "| --- | --- | --- | --- |",
    ]
    for name, seconds in result["seconds"].items():
        least, most = result["spread"][name]
        lines.append(
            f"| {name} | {seconds:.4f} | {least:.4f} to {most:.4f} | {seconds / best:.2f} |"
        )
    return "\n".join(lines)


def main(
    task: str,
    height: int,
    width: int,
    batch: int,
    rounds: int,
    threads: int | None,
    output: Path,
    device: str = "cpu",
) -> None:
    """Run, print a table, and save it with all figures as ``output``/benchmark_<task>.{md,json}."""
    result = run_benchmark(task, height, width, batch, rounds, threads, device)
    table = to_markdown(result)
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    on_device = "" if device == "cpu" else f"_{device}"
    stem = output / f"benchmark_{task}_{batch}x{height}x{width}{on_device}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2))
    stem.with_suffix(".md").write_text(table + "\n")
