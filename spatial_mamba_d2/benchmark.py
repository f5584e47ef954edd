"""Latency of operators and models, ours and timm's, compared in one run.

Results are checked before they are timed; candidates take turns, and the medians over the rounds
are reported, so that a disturbance of the machine meets all of them alike.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from spatial_mamba_d2 import model_zoo
from spatial_mamba_d2.models import build_backbone, optimize_for_inference
from spatial_mamba_d2.models.flops import official_flops
from spatial_mamba_d2.models.inference import PackedLinear
from spatial_mamba_d2.ops import _extension, structure_aware_ssm

PEERS = {
    "timm swin_tiny": "swin_tiny_patch4_window7_224",
    "timm convnext_tiny": "convnext_tiny",
    "timm mambaout_tiny": "mambaout_tiny",
}
NATIVE, EAGER = "ours, compiled operators", "ours, plain PyTorch operators"
OPTIMISED, OPTIMISED_BF16 = "ours, optimised", "ours, optimised, bfloat16"
GEMM = ("MKL product 2048 x 2048 x 2048", "oneDNN product 2048 x 2048 x 2048, packed")
GEMM_SIDE = 2048
CHANNELS_LAST = torch.channels_last
GROWTH_SIDES = (256, 512, 1024, 2048)
TASKS = ("op", "backbone", "train", "growth", "detector")
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
    compiled: bool = False,
) -> dict[str, Any]:
    """Check, then time one task, in float32 where the name does not say otherwise.

    Args:
        task: ``"op"``: the fused operator on a map of a quarter of the image's size with 128
            channels, forward and backward; ``"backbone"``: the four feature maps, forward;
            ``"train"``: forward and backward of the same; ``"growth"``: the backbone at squares of
            256 to 2048 pixels; ``"detector"``: Mask R-CNN with random weights.
        height, width: of the image in pixels; not of ``"growth"``.
        batch: images.
        rounds: turns of each candidate.
        threads: of PyTorch; ``None`` leaves them.
        device: ``"cpu"`` or ``"cuda"``.
        compiled: of ``"backbone"``, also time all models under ``torch.compile``, with frozen
            weights; compiling takes minutes.

    Returns:
        a dictionary with ``machine``, ``task``, ``seconds`` (median of each candidate) and
        ``spread`` (least and most of each). On a CPU also, by task: ``gemm_gflops``, the best
        rate of a large matrix product in the same run, and ``gemm_share`` of it that ours reach,
        by the authors' FLOPs, 2 per multiply-add; ``saved_mb`` that training keeps for the backward
        pass; ``growth``, the exponent of latency over pixels.

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
    extra: dict[str, Any] = {}
    with torch.device(device):
        if task == "op":
            candidates = _operator_candidates(batch, height // 4 or 1, width // 4 or 1, 128)
        elif task == "growth":
            candidates = _growth_candidates(batch)
        elif task == "detector":
            candidates = _detector_candidates(batch, height, width)
        elif task == "train":
            candidates, extra["saved_mb"] = _training_candidates(batch, height, width)
        else:
            candidates = _backbone_candidates(batch, height, width, compiled)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):  # the first one warms up
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    if GEMM[0] in seconds:
        flops = (
            2e9 * official_flops(build_backbone("tiny").eval(), (batch, 3, height, width))["total"]
        )
        best = 2 * GEMM_SIDE**3 / min(seconds[name] for name in GEMM)
        extra["gemm_gflops"] = best / 1e9
        extra["gemm_share"] = {
            name: flops / value / best
            for name, value in seconds.items()
            if name.startswith("ours") and "bfloat16" not in name
        }
    if task == "growth":
        extra["growth"] = {
            kind: _exponent({side: seconds[f"{kind}, {side}"] for side in GROWTH_SIDES})
            for kind in (_ours()[0], OPTIMISED)
        }
    return {
        "machine": describe_machine(device),
        "task": f"{task}, batch {batch}, {_sizes(task, height, width)}, float32 unless named, "
        f"median of {rounds} interleaved rounds",
        "seconds": seconds,
        "spread": {name: (min(values), max(values)) for name, values in times.items()},
        **extra,
    }


def _sizes(task: str, height: int, width: int) -> str:
    return "squares" if task == "growth" else f"{height} x {width} pixels"


def _exponent(seconds: dict[int, float]) -> float:
    """Slope of log(seconds) over log(pixels), by least squares."""
    pixels = [math.log(side * side) for side in seconds]
    return statistics.linear_regression(pixels, list(map(math.log, seconds.values()))).slope


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


def _peers(height: int, width: int, train: bool) -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {}
    for name, timm_name in PEERS.items():
        size: dict[str, Any] = {"img_size": (height, width)} if "swin" in timm_name else {}
        models[name] = timm.create_model(timm_name, features_only=True, **size).train(train)
    return models


def _infer(model: Callable[[Tensor], Any], image: Tensor) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return model(image)

    return forward


def _backbone_candidates(batch: int, height: int, width: int, compiled: bool) -> Candidates:
    image = torch.randn(batch, 3, height, width)
    ours = build_backbone("tiny").eval()
    candidates = {name: _served_by(name, _infer(ours, image)) for name in _ours()}
    peers = _peers(height, width, train=False)
    models: dict[str, nn.Module] = {}
    if image.device.type == "cpu":
        candidates[OPTIMISED] = _infer(optimize_for_inference(ours), image)
        _check({name: candidate()["res5"] for name, candidate in candidates.items()})
        half = optimize_for_inference(ours, torch.bfloat16)
        candidates[OPTIMISED_BF16] = _infer(half, image)
        _check({name: candidates[name]()["res5"] for name in (OPTIMISED, OPTIMISED_BF16)}, 0.1)
        side = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
        candidates[GEMM[0]] = lambda: F.linear(side[0], side[1])
        packed = PackedLinear(side[1])
        candidates[GEMM[1]] = lambda: packed(side[0])
    else:
        _check({name: candidate()["res5"] for name, candidate in candidates.items()})
    for name, peer in peers.items():
        models[name] = peer
        models[f"{name}, channels_last"] = copy.deepcopy(peer).to(memory_format=CHANNELS_LAST)
        models[f"{name}, bfloat16"] = copy.deepcopy(peer).bfloat16()
    for name, model in models.items():
        x = image.bfloat16() if "bfloat16" in name else image
        memory_format = CHANNELS_LAST if "channels_last" in name else torch.contiguous_format
        candidates[name] = _infer(model, x.contiguous(memory_format=memory_format))
    if compiled:
        inductor_config.freezing = True
        for name, model in {NATIVE: ours, **peers}.items():
            candidates[f"{name}, torch.compile"] = _infer(torch.compile(model), image)
    return candidates


def _training_candidates(
    batch: int, height: int, width: int
) -> tuple[Candidates, dict[str, float]]:
    image = torch.randn(batch, 3, height, width)
    ours = build_backbone("tiny").eval()
    _check({n: _served_by(n, _infer(ours, image))()["res5"] for n in _ours()})

    def step(model: nn.Module) -> None:
        model.zero_grad()
        outputs = model(image)
        outputs = outputs.values() if isinstance(outputs, dict) else outputs
        sum(output.mean() for output in outputs).backward()

    models = {"ours": ours.train(), **_peers(height, width, train=True)}
    saved = {name: saved_bytes(model, image) / 1e6 for name, model in models.items()}
    candidates = {name: _served_by(name, partial(step, ours)) for name in _ours()}
    others = {name: partial(step, model) for name, model in models.items() if name != "ours"}
    return {**candidates, **others}, saved


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of what is kept for the backward pass: each storage once, without parameters and x."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), x)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in known:
            kept[address] = tensor  # alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _growth_candidates(batch: int) -> Candidates:
    kind = _ours()[0]
    model = build_backbone("tiny").eval()
    optimised = optimize_for_inference(model)
    candidates: Candidates = {}
    for side in GROWTH_SIDES:
        image = torch.randn(batch, 3, side, side)
        candidates[f"{kind}, {side}"] = _infer(model, image)
        candidates[f"{OPTIMISED}, {side}"] = _infer(optimised, image)
    return candidates


def _detector_candidates(batch: int, height: int, width: int) -> Candidates:
    model = model_zoo.build("mask_rcnn_spatial_mamba_t").to(torch.get_default_device())
    image = torch.randint(256, (3, height, width)).float()
    inputs: Any = [{"image": image, "height": height, "width": width}] * batch
    candidates = {name: _served_by(name, _infer(model, inputs)) for name in _ours()}
    if image.device.type == "cpu":
        optimised = optimize_for_inference(model)
        candidates[OPTIMISED] = _infer(optimised, inputs)
        # Random weights detect nothing; the pyramids are to agree.
        tensor = model.preprocess_image(inputs).tensor
        pyramids = {"ours": model.backbone, OPTIMISED: optimised.backbone}
        _check({name: _infer(network, tensor)()["p5"] for name, network in pyramids.items()})
    return candidates


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
    if "gemm_share" in result:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result["gemm_share"].items())
        lines += ["", f"Best matrix product {result['gemm_gflops']:.0f} GFLOP/s; of it: {shares}"]
    if "saved_mb" in result:
        sizes = ", ".join(f"{name} {size:.0f} MB" for name, size in result["saved_mb"].items())
        lines += ["", f"Kept for the backward pass: {sizes}"]
    if "growth" in result:
        exponents = ", ".join(f"{name} {value:.3f}" for name, value in result["growth"].items())
        lines += ["", f"Latency grows with pixels to the power of: {exponents}"]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Medians as bars, with a line from the least to the most of each candidate."""
    from matplotlib.figure import Figure

    names, medians = list(result["seconds"]), list(result["seconds"].values())
    figure = Figure(figsize=(8, 1 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, medians, color=["C0" if n.startswith("ours") else "C7" for n in names])
    for place, name in enumerate(names):
        axes.plot(result["spread"][name], (place, place), color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(result["task"], fontsize="small")
    figure.savefig(path)


def main(
    task: str,
    height: int,
    width: int,
    batch: int,
    rounds: int,
    threads: int | None,
    output: Path,
    device: str = "cpu",
    compiled: bool = False,
) -> None:
    """Run, print a table, and save it as ``output``/benchmark_<task>.md, all figures as .json.

    Where matplotlib is installed there is a .png too.
    """
    result = run_benchmark(task, height, width, batch, rounds, threads, device, compiled)
    table = to_markdown(result)
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    on_device = "" if device == "cpu" else f"_{device}"
    stem = output / f"benchmark_{task}_{batch}x{height}x{width}{on_device}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2))
    stem.with_suffix(".md").write_text(table + "\n")
    if importlib.util.find_spec("matplotlib"):
        draw(result, stem.with_suffix(".png"))
