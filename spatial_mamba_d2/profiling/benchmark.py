"""Time and memory of operators, backbones and a detector, ours and others', compared in one run.

Results are checked before they are timed; candidates take turns, and the medians over the rounds
are reported, so that a disturbance of the machine meets all of them alike. Matrix products of
2048 x 2048 take their turns too: what they reach is the peak that backbones are held against.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2.model_zoo import get_config
from spatial_mamba_d2.models import build_backbone, optimize_for_inference
from spatial_mamba_d2.models.optimized import PackedLinear
from spatial_mamba_d2.ops import _extension, structure_aware_ssm
from spatial_mamba_d2.profiling.flops import official_flops
from spatial_mamba_d2.system.allocator import keep_freed_memory, release_freed_memory

PEERS = {
    "timm swin_tiny": "swin_tiny_patch4_window7_224",
    "timm convnext_tiny": "convnext_tiny",
    "timm mambaout_tiny": "mambaout_tiny",
}
NATIVE, EAGER = "ours, compiled operators", "ours, plain PyTorch operators"
OPTIMISED = "ours, optimised"
TASKS = ("op", "backbone", "train", "growth", "detector")
DEVICES = ("cpu", "cuda")
GROWTH_PX = (256, 512, 1024, 2048)
GEMM = 2048
#: largest difference between two candidates, over the largest value
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
Candidates = dict[str, Callable[[], Any]]


def run_benchmark(
    task: str,
    height: int,
    width: int,
    batch: int = 1,
    rounds: int = 7,
    threads: int | None = None,
    device: str = "cpu",
    compile: bool = False,
    growth_px: Iterable[int] = GROWTH_PX,
    keep_memory: bool = False,
) -> dict[str, Any]:
    """Check, then time one task in float32; backbones in bfloat16 too.

    Args:
        task: ``"op"``: the fused operator on a map of a quarter of the image's size with 128
            channels, forward and backward; ``"backbone"``: the four feature maps, forward;
            ``"train"``: forward and backward of the same; ``"growth"``: ``"backbone"`` on squares
            of ``growth_px``; ``"detector"``: all layers of Mask R-CNN, with 1000 proposals and 100
            detections for each image.
        height, width: of the image in pixels.
        batch: images.
        rounds: turns of each candidate.
        threads: of PyTorch; ``None`` leaves them.
        device: ``"cpu"`` or ``"cuda"``.
        compile: time backbones by ``torch.compile`` too, with frozen weights.
        growth_px: sides of the images in pixels.
        keep_memory: call :func:`.allocator.keep_freed_memory` first, which holds for all
            candidates and for this process from then on.

    Returns:
        a dictionary with ``machine``, ``task``, ``seconds`` (median of each candidate), ``spread``
        (least and most of each) and ``memory_mb``: what a training step saves for its backward
        pass, or by how much other calls raise the memory of the process (on Linux). Backbones add
        ``peak_gflops`` of a matrix product and ``peak_fraction``, what ours reach of it, by
        :mod:`.flops` at 2 FLOPs per multiply-add; ``"growth"`` adds ``exponent``, fitted to
        seconds over pixels, and has dictionaries by pixels in place of numbers.

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
    kept = keep_memory and keep_freed_memory()
    torch.manual_seed(0)
    with torch.device(device):
        if task == "op":
            candidates = _operator_candidates(batch, height // 4 or 1, width // 4 or 1, 128)
            result = _measure(candidates, rounds, device)
        elif task == "train":
            candidates, memory = _training_candidates(batch, height, width)
            result = {**_measure(candidates, rounds, device), "memory_mb": memory}
        elif task == "detector":
            result = _measure(_detector_candidates(batch, height, width), rounds, device)
        elif task == "backbone":
            candidates = _backbone_candidates(batch, height, width, compile)
            result = _measure(candidates, rounds, device)
            result |= _fraction_of_peak(result["seconds"], (batch, 3, height, width))
        else:
            result = _growth(batch, rounds, device, tuple(growth_px))
    pixels = "growing images" if task == "growth" else f"{height} x {width} pixels"
    return {
        "machine": describe_machine(device),
        "task": f"{task}, batch {batch}, {pixels}, float32 unless told otherwise, "
        f"median of {rounds} interleaved rounds, freed memory {'kept' if kept else 'given back'}",
        **result,
    }


def _measure(candidates: Candidates, rounds: int, device: str) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    memory: dict[str, float] = {}
    for turn in ("warm up", "memory", "warm up", *range(rounds)):
        for name, candidate in candidates.items():
            before = _reset_peak_memory_mb() if turn == "memory" else None
            start = time.perf_counter()
            candidate()
            if device == "cuda":
                torch.cuda.synchronize()
            if isinstance(turn, int):
                times[name].append(time.perf_counter() - start)
            if before is not None:
                memory[name] = _memory_mb("VmHWM") - before
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: (min(values), max(values)) for name, values in times.items()},
        "memory_mb": memory,
    }


def _memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1e3


def _reset_peak_memory_mb() -> float | None:
    """Memory of this process, from which its peak counts anew; ``None`` where that is unknown."""
    release_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory_mb("VmRSS")


def _growth(batch: int, rounds: int, device: str, sides: tuple[int, ...]) -> dict[str, Any]:
    figures: dict[str, dict[str, dict[int, Any]]] = {}
    for side in sides:
        candidates = _backbone_candidates(batch, side, side, compile=False)
        chosen = {n: c for n, c in candidates.items() if "bfloat16" not in n and "GEMM" not in n}
        for key, values in _measure(chosen, rounds, device).items():
            for name, value in values.items():
                figures.setdefault(key, {}).setdefault(name, {})[side**2] = value
    exponents = {name: _exponent(values) for name, values in figures["seconds"].items()}
    return {**figures, "exponent": exponents}


def _exponent(seconds: dict[int, float]) -> float:
    """The slope of log(seconds) over log(pixels), by least squares."""
    x = [math.log(pixels) for pixels in seconds]
    return statistics.linear_regression(x, [math.log(s) for s in seconds.values()]).slope


def _fraction_of_peak(seconds: dict[str, float], shape: tuple[int, ...]) -> dict[str, Any]:
    products = {name: value for name, value in seconds.items() if "GEMM" in name}
    peak = {name: 2 * GEMM**3 / 1e9 / value for name, value in products.items()}
    gflop = 2 * official_flops(build_backbone("tiny").eval(), shape)["total"]
    best = max((value for name, value in peak.items() if "bfloat16" not in name))
    fraction = {
        name: gflop / value / best
        for name, value in seconds.items()
        if name.startswith("ours") and "bfloat16" not in name
    }
    return {"peak_gflops": peak, "peak_fraction": fraction}


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


def _check(outputs: dict[str, Tensor], tolerance: float = TOLERANCE[torch.float32]) -> None:
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
    y = torch.empty_like(u)
    same_bytes = partial(torch.add, u, delta, out=y)
    return {**candidates, "u + delta, the same bytes in one pass": same_bytes}


def _peer(timm_name: str, height: int, width: int) -> nn.Module:
    size: dict[str, Any] = {"img_size": (height, width)} if "swin" in timm_name else {}
    return timm.create_model(timm_name, features_only=True, **size)


def _coarsest(outputs: Any) -> Tensor:
    return (list(outputs.values()) if isinstance(outputs, dict) else outputs)[-1]


def _forward(model: Callable, image: Tensor, dtype: torch.dtype = torch.float32) -> Callable:
    """Inference, under autocast for another dtype than float32; gives the coarsest map."""

    def forward() -> Tensor:
        autocast = torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), autocast:
            return _coarsest(model(image))

    return forward


def _in_better_format(
    model: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32
) -> Callable:
    """The faster of PyTorch's two memory formats, by the second call in each."""

    def seconds(forward: Callable) -> float:
        forward()
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    formats = (torch.contiguous_format, torch.channels_last)
    images = [image.contiguous(memory_format=memory_format) for memory_format in formats]
    trials = [
        seconds(_forward(model.to(memory_format=memory_format), x, dtype))
        for memory_format, x in zip(formats, images, strict=True)
    ]
    best = trials.index(min(trials))
    return _forward(model.to(memory_format=formats[best]), images[best], dtype)


def _backbone_candidates(batch: int, height: int, width: int, compile: bool) -> Candidates:
    image = torch.randn(batch, 3, height, width)
    ours = build_backbone("tiny").eval()
    low = torch.bfloat16
    exact = {name: _served_by(name, _forward(ours, image)) for name in _ours()}
    exact[OPTIMISED] = _forward(optimize_for_inference(ours), image)
    rough = {
        "ours, bfloat16 by autocast": _forward(ours, image, low),
        f"{OPTIMISED}, bfloat16": _forward(optimize_for_inference(ours, low), image),
    }
    models = {name: _peer(timm_name, height, width).eval() for name, timm_name in PEERS.items()}
    peers = {}
    for name, model in models.items():
        peers[name] = _in_better_format(model, image)
        peers[f"{name}, bfloat16 by autocast"] = _in_better_format(copy.deepcopy(model), image, low)
        converted = copy.deepcopy(model).to(low)
        peers[f"{name}, bfloat16 weights"] = _in_better_format(converted, image.to(low))
    if compile:
        exact["ours, torch.compile"] = _compiled(ours, image)
        for name, model in models.items():
            compiled = peers[f"{name}, torch.compile"] = _compiled(model, image)
            _check({name: peers[name](), f"{name}, torch.compile": compiled()})
    _check({name: candidate() for name, candidate in exact.items()})
    reference = exact[OPTIMISED]()
    for name, candidate in rough.items():
        _check({OPTIMISED: reference, name: candidate().float()}, TOLERANCE[low])
    return {**exact, **rough, **peers, **_matrix_products()}


def _compiled(model: nn.Module, image: Tensor) -> Callable:
    """``torch.compile`` with the weights frozen; compiles at once."""
    from torch._inductor import config

    torch._dynamo.reset()
    forward = _forward(torch.compile(copy.deepcopy(model)), image)
    with config.patch(freezing=True):
        forward()
    return forward


def _matrix_products() -> Candidates:
    x, weight = torch.randn(2, GEMM, GEMM)
    packed = PackedLinear(weight)
    name = f"GEMM {GEMM}^3"
    candidates: Candidates = {f"{name}, PyTorch's linear": lambda: F.linear(x, weight)}
    if packed.packed:
        candidates[f"{name}, packed for oneDNN"] = lambda: packed(x)
    return candidates


def _training_candidates(
    batch: int, height: int, width: int
) -> tuple[Candidates, dict[str, float]]:
    """Steps, and the MB that each saves for its backward pass."""
    image = torch.randn(batch, 3, height, width)
    ours = build_backbone("tiny")
    _check({name: _served_by(name, _forward(ours.eval(), image))() for name in _ours()})
    ours.train()
    models: dict[str, nn.Module] = dict.fromkeys(_ours(), ours)
    models |= {name: _peer(timm_name, height, width).train() for name, timm_name in PEERS.items()}

    def loss(model: nn.Module) -> Tensor:
        outputs = model(image)
        maps = outputs.values() if isinstance(outputs, dict) else outputs
        return torch.stack([output.mean() for output in maps]).sum()

    def step(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            loss(model).backward()

        return call

    def kernels(name: str) -> str:
        return name if name == EAGER else NATIVE

    candidates = {n: _served_by(kernels(n), step(model)) for n, model in models.items()}
    memory = {
        n: saved_bytes(model, _served_by(kernels(n), partial(loss, model))) / 1e6
        for n, model in models.items()
    }
    return candidates, memory


def saved_bytes(model: nn.Module, function: Callable[[], Tensor]) -> int:
    """What ``function`` keeps for its backward pass: each storage once, but for weights."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())


def _detector_candidates(batch: int, height: int, width: int) -> Candidates:
    from spatial_mamba_d2.profiling.detector_layers import build_detector, run_parts

    name = "mask_rcnn_spatial_mamba_t"
    device = ["MODEL.DEVICE", torch.get_default_device().type]
    resnet = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    resnet += ["MODEL.RESNETS.OUT_FEATURES", str(["res2", "res3", "res4", "res5"])]
    ours = build_detector(get_config(name, device)).eval()
    other = build_detector(get_config(name, device + resnet)).eval()
    images = torch.randn(batch, 3, height, width)

    def forward(model: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return run_parts(model, images)[0][0][0]  # objectness on the finest level

        return call

    candidates = {name: _served_by(name, forward(ours)) for name in _ours()}
    candidates[OPTIMISED] = forward(optimize_for_inference(ours))
    _check({name: candidate() for name, candidate in candidates.items()})
    return {**candidates, "Detectron2 ResNet-50": forward(other)}


def to_markdown(result: dict[str, Any]) -> str:
    """A table of the result, with ratios to the fastest of ours that are float32."""
    machine = result["machine"]
    lines = [
        f"{result['task']}; on {machine['device']}; {machine['processor']}, "
        f"{machine['threads']} threads, {machine['capability']}, PyTorch {machine['torch']}",
        "",
    ]
    if "exponent" in result:
        rows = result["seconds"]
        pixels = list(next(iter(rows.values())))
        head = [*(f"{math.isqrt(p)}^2: s" for p in pixels), "exponent", "MB at the largest"]
        body = {
            name: [*(f"{s:.4f}" for s in row.values()), f"{result['exponent'][name]:.2f}",
                   _cell(result["memory_mb"].get(name, {}).get(pixels[-1]), ".0f")]
            for name, row in rows.items()
        }  # fmt: skip
    else:
        rows = {n: s for n, s in result["seconds"].items() if n.startswith("ours")}
        best = min(s for name, s in rows.items() if "bfloat16" not in name)
        head = ["median s", "least to most", "relative", "MB", "of the GEMM peak"]
        fraction = result.get("peak_fraction", {})
        body = {
            name: [f"{seconds:.4f}", "{:.4f} to {:.4f}".format(*result["spread"][name]),
                   f"{seconds / best:.2f}", _cell(result["memory_mb"].get(name), ".0f"),
                   _cell(fraction.get(name), ".2f")]
            for name, seconds in result["seconds"].items()
        }  # fmt: skip
    table = {"": head, **dict.fromkeys(["---"], ["---"] * len(head)), **body}
    return "\n".join(lines + [f"| {n} | {' | '.join(cells)} |" for n, cells in table.items()])


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


def main(
    task: str,
    height: int,
    width: int,
    batch: int,
    rounds: int,
    threads: int | None,
    output: Path,
    device: str = "cpu",
    compile: bool = False,
    keep_memory: bool = False,
) -> None:
    """Run, print a table, and save it with all figures as ``output``/benchmark_*.{md,json,png}."""
    result = run_benchmark(
        task, height, width, batch, rounds, threads, device, compile, keep_memory=keep_memory
    )
    table = to_markdown(result)
    print(table)
    output.mkdir(parents=True, exist_ok=True)
    size = f"_{batch}" if task == "growth" else f"_{batch}x{height}x{width}"
    on_device = "" if device == "cpu" else f"_{device}"
    on_threads = f"_{threads}threads" if threads else ""
    stem = str(output / f"benchmark_{task}{size}{on_device}{on_threads}")
    Path(stem + ".json").write_text(json.dumps(result, indent=2))
    Path(stem + ".md").write_text(table + "\n")
    try:
        plot(result, Path(stem + ".png"))
    except ImportError:
        logging.getLogger(__name__).info("no picture, for matplotlib is not installed")
