"""Time and memory of operators, backbones and a detector, ours and others', compared in one run.

Results are checked before they are timed. Candidates take turns, and medians over the rounds are
reported, so that a disturbance of the machine affects all of them alike. Matrix products of
2048 x 2048 take turns too: their rate is the peak that backbones are measured against.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import timm
import torch

from spatial_mamba_d2.models import build_backbone
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.profiling.backbone_candidates import (
    backbone_candidates,
    training_candidates,
)
from spatial_mamba_d2.profiling.candidates import (
    Candidates,
    detector_candidates,
    is_float32,
    operator_candidates,
    prediction_candidates,
    segmentation_candidates,
)
from spatial_mamba_d2.profiling.exported import export_candidates
from spatial_mamba_d2.profiling.flops import official_flops
from spatial_mamba_d2.profiling.gemm_peak import fraction_of_peak, matrix_products
from spatial_mamba_d2.profiling.gpu import float32_precision, peak_gpu_mb
from spatial_mamba_d2.profiling.memory import peak_memory_mb, reset_peak_memory_mb
from spatial_mamba_d2.profiling.timing import call_seconds
from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.processor import describe_processor

TASKS = ("op", "backbone", "train", "growth", "detector", "prediction", "segmentation", "export")
DEVICES = ("cpu", "cuda")
GROWTH_PX = (256, 512, 1024, 2048)


def run_benchmark(
    task: str,
    height: int,
    width: int,
    batch: int = 1,
    rounds: int = 7,
    threads: int | None = None,
    device: str = "cpu",
    compile: bool = False,
    openvino: bool = False,
    growth_px: Iterable[int] = GROWTH_PX,
    keep_memory: bool = False,
) -> dict[str, Any]:
    """Check, then time one task in float32, without TF32; networks in bfloat16 too.

    Args:
        task: ``"op"``: the fused operator on a map of a quarter of the image's size with 128
            channels, forward and backward; ``"backbone"``: the four feature maps, forward;
            ``"train"``: forward and backward of the same; ``"growth"``: ``"backbone"`` on squares
            of ``growth_px``; ``"detector"``: all layers of Mask R-CNN, with 1000 proposals and 100
            detections for each image; ``"prediction"``: the same network from images to masks;
            ``"segmentation"``: UPerNet, from images to logits; ``"export"``: backbone and UPerNet
            in PyTorch, and as files in onnxruntime and OpenVINO, on a CPU.
        height, width: size of the image in pixels.
        batch: images per call.
        rounds: how often each candidate is timed.
        threads: PyTorch's number of threads; ``None`` leaves it as it is.
        device: ``"cpu"`` or ``"cuda"``.
        compile: time backbones by ``torch.compile`` too, with frozen weights.
        openvino: time other backbones by OpenVINO too, on a CPU.
        growth_px: sides of the images in pixels.
        keep_memory: call :func:`.allocator.keep_freed_memory` first, which affects all candidates
            and the rest of this process.

    Returns:
        a dictionary with ``machine``, ``task``, ``seconds`` (median of each candidate), ``spread``
        (least and most of each) and ``memory_mb``: what a training step saves for its backward
        pass, or by how much other calls raise the memory of the process (on Linux) or, on a GPU, of
        PyTorch's tensors. Backbones add ``peak_gflops``, the rate of matrix products, and
        ``peak_fraction``, what ours reach of the best of them in the same precision, by
        :mod:`.flops` at 2 FLOPs per multiply-add; ``"growth"`` adds ``exponent``,
        fitted to seconds over pixels, and has dictionaries by pixels in place of numbers.

    Raises:
        ImportError: a package that the task or ``openvino`` needs is not installed.
        ValueError: no such task, a number below 1, or a device that is not available.
        RuntimeError: the results of two candidates that must agree do not.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    for name, value in {"height": height, "width": width, "batch": batch, "rounds": rounds}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        available = DEVICES if torch.cuda.is_available() else DEVICES[:1]
        raise ValueError(f"device must be one of {', '.join(available)} here, got {device!r}")
    if task == "export" and device != "cpu":
        raise ValueError(f"device must be cpu for the task export, got {device!r}")
    if openvino and device != "cpu":
        raise ValueError(f"device must be cpu for OpenVINO, got {device!r}")
    if threads:
        torch.set_num_threads(threads)
    kept = keep_memory and keep_freed_memory()
    torch.manual_seed(0)
    with torch.device(device), float32_precision(tf32=False):
        if task == "op":
            candidates = operator_candidates(batch, height // 4 or 1, width // 4 or 1, 128)
            result = _measure(candidates, rounds, device)
        elif task == "train":
            candidates, memory_mb = training_candidates(batch, height, width)
            result = {**_measure(candidates, rounds, device), "memory_mb": memory_mb}
        elif task == "detector":
            result = _measure(detector_candidates(batch, height, width), rounds, device)
        elif task == "prediction":
            result = _measure(prediction_candidates(batch, height, width), rounds, device)
        elif task == "segmentation":
            result = _measure(segmentation_candidates(batch, height, width), rounds, device)
        elif task == "export":
            result = _measure(export_candidates(batch, height, width), rounds, device)
        elif task == "backbone":
            candidates = backbone_candidates(batch, height, width, compile, openvino)
            candidates |= matrix_products()
            result = _measure(candidates, rounds, device)
            flops = official_flops(build_backbone("tiny").eval(), (batch, 3, height, width))
            result |= fraction_of_peak(result["seconds"], 2 * flops["total"])
        else:
            result = _growth(batch, rounds, device, tuple(growth_px))
    size = "growing images" if task == "growth" else f"{height} x {width} pixels"
    return {
        "machine": describe_machine(device),
        "task": f"{task}, batch {batch}, {size}, float32 unless stated otherwise, "
        + ("TF32 off, " if device == "cuda" else "")
        + f"median of {rounds} interleaved rounds, freed memory {'kept' if kept else 'given back'}",
        **result,
    }


def _measure(candidates: Candidates, rounds: int, device: str) -> dict[str, Any]:
    def warm_up() -> None:
        for candidate in candidates.values():
            call_seconds(candidate, device)

    warm_up()
    memory_mb: dict[str, float] = {}
    for name, candidate in candidates.items():
        if device == "cuda":
            memory_mb[name] = peak_gpu_mb(candidate)
            continue
        before_mb = reset_peak_memory_mb()
        candidate()
        if before_mb is not None:
            memory_mb[name] = peak_memory_mb() - before_mb

    warm_up()  # again, because resetting the peak gave freed memory back
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            times[name].append(call_seconds(candidate, device))

    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: (min(values), max(values)) for name, values in times.items()},
        "memory_mb": memory_mb,
    }


def _growth(batch: int, rounds: int, device: str, sides_px: tuple[int, ...]) -> dict[str, Any]:
    figures: dict[str, dict[str, dict[int, Any]]] = {}
    for side_px in sides_px:
        candidates = backbone_candidates(batch, side_px, side_px)
        chosen = {name: call for name, call in candidates.items() if is_float32(name)}
        for key, values in _measure(chosen, rounds, device).items():
            for name, value in values.items():
                figures.setdefault(key, {}).setdefault(name, {})[side_px**2] = value
    exponents = {name: _exponent(values) for name, values in figures["seconds"].items()}
    return {**figures, "exponent": exponents}


def _exponent(seconds: dict[int, float]) -> float:
    """The slope of log(seconds) over log(pixels), by least squares."""
    x = [math.log(pixels) for pixels in seconds]
    return statistics.linear_regression(x, [math.log(s) for s in seconds.values()]).slope


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor and its abilities, threads, instruction set, GPU and versions."""
    return {
        **describe_processor(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "operators": _extension.status(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
