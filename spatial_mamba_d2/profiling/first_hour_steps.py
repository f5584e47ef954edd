"""The steps of :mod:`.first_hour`: each measures something, or raises an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from spatial_mamba_d2 import ops
from spatial_mamba_d2.models import build_backbone, optimize_for_inference
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.cuda.kernels import OPENERS
from spatial_mamba_d2.profiling import dram_model
from spatial_mamba_d2.profiling.backbone_candidates import PEERS
from spatial_mamba_d2.profiling.benchmark import describe_machine, run_benchmark
from spatial_mamba_d2.profiling.dram_model import Launch, Problem
from spatial_mamba_d2.profiling.gpu import (
    float32_precision,
    graphed,
    launch_times,
    peak_gpu_mb,
    seconds_of,
    synchronize,
)
from spatial_mamba_d2.profiling.timing import median_seconds

Result = dict[str, Any]


class Settings(NamedTuple):
    """What the steps run on."""

    device: str = "cuda"
    height: int = 800  # of images in pixels
    width: int = 1280
    training_px: int = 512  # side of the images of training
    batch: int = 2  # of training
    rounds: int = 20
    variant: str = "tiny"

    def words(self) -> list[str]:
        """As options of ``tools/gpu_first_hour.py``."""
        size = ["--size", str(self.height), str(self.width)]
        others = [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in _OPTIONS]
        return [*size, *others]


_OPTIONS = ("device", "training_px", "batch", "rounds", "variant")


def machine(settings: Settings) -> Result:
    """What everything else was measured on."""
    found = describe_machine(settings.device)
    if settings.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit,memory.total"]
        try:
            done = subprocess.run([*query, "--format=csv"], capture_output=True, text=True)
            found["nvidia-smi"] = done.stdout.strip()
        except OSError as error:
            found["nvidia-smi"] = str(error)
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def run_tests(settings: Settings, *paths: str) -> Result:
    """The tests that a GPU runs; needs a checkout.

    Raises:
        RuntimeError: one of them failed.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests/gpu").is_dir():
        return {"left out": "the tests are not part of an installed package"}
    words = [*(paths or ("tests/gpu", "tests/ops")), "-q", "-x", "-p", "no:cacheprovider"]
    words += ["-k", "cuda or CUDA"] if settings.device == "cuda" else ["--collect-only"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=root, capture_output=True, text=True
    )
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode:
        raise RuntimeError(f"pytest {' '.join(words)}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return {"pytest": " ".join(last)}


def _error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def pattern_loss(maps: Iterable[Tensor]) -> Tensor:
    """The mean square distance to a pattern; without one, norms would make it nearly constant."""
    losses = []
    for x in maps:
        pattern = torch.arange(x[0].numel(), device=x.device).cos().view_as(x[0])
        losses.append((x.float() - pattern).square().mean())
    return torch.stack(losses).sum()


def agreement(settings: Settings) -> Result:
    """Features and gradients of a backbone on the device, against those of plain PyTorch on a CPU.

    Raises:
        RuntimeError: they differ by more than 1e-4 (1e-3) of the largest value.
    """
    torch.manual_seed(0)
    model = build_backbone(settings.variant, drop_path_rate=0.0).eval()
    image = torch.randn(1, 3, settings.height // 2, settings.width // 2)

    def features_and_gradient(on: str) -> tuple[list[Tensor], Tensor]:
        model.zero_grad()
        model.to(on)
        features = list(model(image.to(on)).values())
        pattern_loss(features).backward()
        gradient = model.stem.conv1.conv.weight.grad
        assert gradient is not None
        return [x.detach().cpu() for x in features], gradient.cpu().clone()

    with float32_precision(tf32=False):
        with _extension.without_compiled_kernels():
            expected, gradient = features_and_gradient("cpu")
        actual, actual_gradient = features_and_gradient(settings.device)
        optimized = optimize_for_inference(model)
        with torch.no_grad():
            fast = list(optimized(image.to(settings.device)).values())
    errors = {
        "features": max(map(_error, actual, expected)),
        "optimised features": max(map(_error, fast, expected)),
        "gradient of the first weight": _error(actual_gradient, gradient),
    }
    for name, error in errors.items():
        if not error <= (1e-3 if "gradient" in name else 1e-4):
            raise RuntimeError(f"{name} differ by {error:.1e} of the largest value")
    return errors


def _kernel_cases(problem: Problem, device: str) -> dict[str, tuple[Callable, list[Launch]]]:
    """Calls of every operator that a model uses, and the launches that they make."""
    batch, height, width, dim = problem[:4]
    dtype = {2: torch.bfloat16, 4: torch.float32}[problem.element_bytes]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def map_() -> Tensor:
        return random(batch, height, width, dim).to(dtype)

    u, delta, residual = map_(), map_(), map_()
    A, D, bias = -random(dim).exp(), random(dim), random(dim) - 3
    ssm = [u, delta, A, random(batch, height, width), random(batch, height, width), D, bias]
    ssm.append(0.2 * random(25, dim))
    conv = [u, random(dim, 1, 3, 3), bias]
    gate = [u, delta, D, bias]
    rank = max(dim // 32, 1)
    low_rank = [u, random(batch, height, width, rank).to(dtype), random(dim, rank), *ssm[2:]]
    sums = [u.clone(), bias, delta]
    functions: Any = ops
    operators = torch.ops.spatial_mamba
    halves = random(batch, height, width, 2 * dim).to(dtype).chunk(2, -1)
    halved = map_()[:, : (height + 1) // 2, : (width + 1) // 2].contiguous()
    model = dram_model
    return {
        "structure_aware_ssm": (
            partial(functions.structure_aware_ssm, *ssm),
            model.ssm_forward(problem),
        ),
        "structure_aware_ssm_backward": (
            partial(operators.structure_aware_ssm_backward, delta, *ssm),
            model.ssm_backward(problem),
        ),
        "structure_aware_ssm_from_dt": (
            partial(functions.structure_aware_ssm_from_dt, *low_rank),
            model.ssm_from_dt_forward(problem, rank),
        ),
        "structure_aware_ssm_from_dt_backward": (
            partial(operators.structure_aware_ssm_from_dt_backward, delta, *low_rank),
            model.ssm_from_dt_backward(problem, rank),
        ),
        "depthwise_conv3x3": (
            partial(functions.depthwise_conv3x3, *conv, False),
            model.conv_forward(problem),
        ),
        "depthwise_conv3x3_backward": (
            partial(operators.depthwise_conv3x3_backward, delta, *conv, False),
            model.conv_backward(problem),
        ),
        "depthwise_conv3x3_gradients_": (
            partial(functions.depthwise_conv3x3_gradients_, halves[0], delta, *conv, False),
            model.conv_backward(problem),
        ),
        "depthwise_conv3x3_stride2": (
            partial(functions.depthwise_conv3x3_stride2, *conv),
            model.conv_stride2_forward(problem),
        ),
        "depthwise_conv3x3_stride2_backward": (
            partial(operators.depthwise_conv3x3_stride2_backward, halved, *conv),
            model.conv_stride2_backward(problem),
        ),
        "depthwise_conv3x3_layer_norm": (
            partial(functions.depthwise_conv3x3_layer_norm, *conv, D, bias),
            model.conv_norm_forward(problem),
        ),
        "gated_layer_norm": (
            partial(functions.gated_layer_norm, *gate),
            model.gate_forward(problem),
        ),
        "gated_layer_norm_backward": (
            partial(operators.gated_layer_norm_backward, delta, *gate, 1e-5),
            model.gate_backward(problem),
        ),
        "gated_layer_norm_gradients_": (
            partial(functions.gated_layer_norm_gradients_, halves[1], delta, *gate),
            model.gate_gradients(problem),
        ),
        "gelu_gradients": (
            partial(functions.gelu_gradients, delta, u),
            model.gelu_gradients(problem),
        ),
        "layer_norm_gradients": (
            partial(functions.layer_norm_gradients, delta, residual, u, D, bias),
            model.layer_norm_gradients(problem),
        ),
        "add_bias_": (
            partial(functions.add_bias_, *sums, relu=True),
            model.add_bias(problem, residual=True),
        ),
    }


def kernels(settings: Settings) -> Result:
    """The time of every launch next to its bytes, at each stage, in float32 and bfloat16.

    The bound is what a copy of the largest map of stage 1 reaches on this device.
    """
    device = settings.device
    if device not in OPENERS:
        return {"left out": f"there are no kernels for {device}"}
    source = torch.empty(64 * 2**20 if device == "cuda" else 2**16, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(partial(target.copy_, source), device, settings.rounds)
    bytes_per_second = 2 * source.nbytes / seconds
    rows = []
    with torch.no_grad(), launch_times(device) as times:
        for stage, problem in enumerate(
            dram_model.stage_problems(settings.height, settings.width), start=1
        ):
            for element in (4, 2):
                cases = _kernel_cases(problem._replace(element_bytes=element), device)
                for operator, (call, launches) in cases.items():
                    call()  # compiles
                    times.clear()
                    for _ in range(settings.rounds):
                        call()
                    by_name: dict[str, int] = {}
                    for launch in launches:
                        name = launch.name.partition(",")[0]
                        by_name[name] = by_name.get(name, 0) + launch.num_bytes
                    for name, measured in _by_kernel(seconds_of(times)).items():
                        bound = by_name[name] / bytes_per_second
                        rows.append(
                            {
                                "stage": stage,
                                "bytes per element": element,
                                "operator": operator,
                                "kernel": name,
                                "us": 1e6 * measured,
                                "bound us": 1e6 * bound,
                                "bound over time": bound / measured,
                            }
                        )
    return {"GB/s of a copy": bytes_per_second / 1e9, "launches": rows}


def _by_kernel(seconds: dict[str, float]) -> dict[str, float]:
    """Kernels of several template arguments in one call, such as ``reduce``, together."""
    found: dict[str, float] = {}
    for name, value in seconds.items():
        short = name.partition("<")[0]
        found[short] = found.get(short, 0.0) + value
    return found


def benchmark(task: str, settings: Settings) -> Result:
    """One task of ``tools/benchmark.py``, which checks results first."""
    size = (settings.height, settings.width, 1)
    if task == "train":
        size = (settings.training_px, settings.training_px, settings.batch)
    rounds = min(settings.rounds, 7)
    with float32_precision(tf32=False):
        return run_benchmark(task, *size, rounds, device=settings.device)


def _models(settings: Settings, size: tuple[int, int]) -> dict[str, nn.Module]:
    peers = {name: value for name, value in PEERS.items() if "mamba" not in name}
    models: dict[str, nn.Module] = {"ours": build_backbone(settings.variant)}
    for name, timm_name in peers.items():
        sizes: dict[str, Any] = {"img_size": size} if "swin" in timm_name else {}
        models[name] = timm.create_model(timm_name, features_only=True, **sizes)
    return {name: model.to(settings.device) for name, model in models.items()}


def inference(settings: Settings) -> Result:
    """Backbones as calls and as CUDA graphs: float32, TF32, bfloat16 by autocast; memory."""
    device, size = settings.device, (settings.height, settings.width)
    image = torch.randn(1, 3, *size, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    models = {name: model.eval() for name, model in _models(settings, size).items()}
    candidates: dict[str, tuple[nn.Module, bool, bool]] = {}  # model, TF32, autocast
    for name, model in models.items():
        candidates[f"{name}, float32"] = (model, False, False)
        candidates[f"{name}, TF32"] = (model, True, False)
        candidates[f"{name}, bfloat16 by autocast"] = (model, True, True)
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        optimized = optimize_for_inference(models["ours"], dtype)
        candidates[f"ours, optimised, {name}"] = (optimized, False, False)
    rows = []
    for name, (model, tf32, autocast) in candidates.items():

        def call(model: nn.Module = model, autocast: bool = autocast) -> Any:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
                return model(image)

        with float32_precision(tf32):
            rows.append({"backbone": name, **_figures(call, settings)})
    return {"rows": rows}


def _figures(call: Callable[[], Any], settings: Settings) -> Result:
    """Times of a call and, on a GPU, of its graph, and its memory."""
    device, rounds = settings.device, settings.rounds
    figures: Result = {"ms": 1e3 * median_seconds(call, device, rounds)}
    if device == "cuda":
        figures["peak MB"] = peak_gpu_mb(call)
        try:
            figures["graph ms"] = 1e3 * median_seconds(graphed(call), device, rounds)
        except RuntimeError as error:  # of others' models, too
            figures["graph"] = f"not captured: {str(error).splitlines()[0]}"
    return figures


def training_step(model: nn.Module, image: Tensor, autocast: bool) -> Callable[[], Tensor]:
    """A whole step with AdamW, whose state is on the device, so that a graph can be made of it."""
    is_cuda = image.is_cuda
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, capturable=is_cuda, fused=is_cuda or None)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=autocast):
            outputs = model(image)
        loss = pattern_loss(outputs.values() if isinstance(outputs, dict) else outputs)
        loss.backward()
        optimizer.step()
        return loss

    return step


def training(settings: Settings) -> Result:
    """Whole steps with AdamW: float32 and bfloat16 by autocast, as calls and as CUDA graphs."""
    side, rows = settings.training_px, []
    image = torch.randn(settings.batch, 3, side, side, device=settings.device)
    image = image.contiguous(memory_format=torch.channels_last)
    for name, model in _models(settings, (side, side)).items():
        for autocast in (False, True):
            step = training_step(model.train(), image, autocast)
            label = f"{name}, {'bfloat16 by autocast' if autocast else 'float32'}"
            with float32_precision(tf32=False):
                rows.append({"backbone": label, **_figures(step, settings)})
    return {"rows": rows}


def profile(settings: Settings) -> Result:
    """The longest kernels (on a CPU, operators) of a training step, by PyTorch's profiler."""
    side = settings.training_px
    image = torch.randn(settings.batch, 3, side, side, device=settings.device)
    model = build_backbone(settings.variant).to(settings.device).train()
    step = training_step(model, image, autocast=settings.device == "cuda")
    step()
    synchronize(settings.device)
    activity = torch.profiler.ProfilerActivity
    is_cuda = settings.device == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if is_cuda else activity.CPU]) as found:
        step()
        synchronize(settings.device)
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    rows = [
        {"name": event.key[:80], "calls": event.count, "us": getattr(event, key)}
        for event in events[:40]
    ]
    return {"rows": rows, "calls in total": sum(event.count for event in events)}


#: in the order in which they run: what it does, and its limit in seconds
STEPS: dict[str, tuple[Callable[[Settings], Result], int]] = {
    "machine": (machine, 60),
    "agreement": (agreement, 300),
    "tests": (run_tests, 1500),
    "kernels": (kernels, 600),
    "operator": (partial(benchmark, "op"), 300),
    "inference": (inference, 600),
    "training": (training, 900),
    "backbone": (partial(benchmark, "backbone"), 600),
    "train": (partial(benchmark, "train"), 600),
    "detector": (partial(benchmark, "detector"), 600),
    "profile": (profile, 300),
}
