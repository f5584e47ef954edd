"""What the benchmark times of backbones: ours and timm's, in inference and training.

Like :mod:`.candidates`, in float32 and in bfloat16.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from spatial_mamba_d2.models import build_backbone, optimize_for_inference
from spatial_mamba_d2.profiling.candidates import (
    EAGER,
    NATIVE,
    OPTIMISED,
    TOLERANCE,
    Candidates,
    check_agreement,
    implementations,
    in_int8,
    is_float32,
    outputs_of,
    using,
)
from spatial_mamba_d2.profiling.exported import in_openvino
from spatial_mamba_d2.profiling.gpu import float32_precision, graphed
from spatial_mamba_d2.profiling.memory import saved_bytes
from spatial_mamba_d2.profiling.timing import InContext

PEERS = {
    "timm swin_tiny": "swin_tiny_patch4_window7_224",
    "timm convnext_tiny": "convnext_tiny",
    "timm mambaout_tiny": "mambaout_tiny",
}
GRAPH = "as a CUDA graph"
AUTOCAST = "bfloat16 by autocast"


def _peer(timm_name: str, height: int, width: int) -> nn.Module:
    size: dict[str, Any] = {"img_size": (height, width)} if "swin" in timm_name else {}
    return timm.create_model(timm_name, features_only=True, **size)


def feature_maps(outputs: Any) -> list[Tensor]:
    """A backbone's feature maps, from fine to coarse."""
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def autocast(image: Tensor, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype``, which float32 turns off."""
    return torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32)


def inference(model: Callable, image: Tensor, dtype: torch.dtype = torch.float32) -> Callable:
    """Inference that returns the coarsest map; under autocast if ``dtype`` is not float32."""

    def forward() -> Tensor:
        with torch.no_grad(), autocast(image, dtype):
            return feature_maps(model(image))[-1]

    return forward


def _in_faster_format(
    model: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32
) -> Callable:
    """Inference in the faster of PyTorch's two memory formats, by the second call in each."""

    def seconds(forward: Callable) -> float:
        forward()
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    formats = (torch.contiguous_format, torch.channels_last)
    images = [image.contiguous(memory_format=memory_format) for memory_format in formats]
    trials = [
        seconds(inference(model.to(memory_format=memory_format), x, dtype))
        for memory_format, x in zip(formats, images, strict=True)
    ]
    best = trials.index(min(trials))
    return inference(model.to(memory_format=formats[best]), images[best], dtype)


def backbone_candidates(
    batch: int, height: int, width: int, compile: bool = False, openvino: bool = False
) -> Candidates:
    """Inference of backbones in float32 and bfloat16, and of ours in 8 bits.

    Args:
        compile: by ``torch.compile`` too.
        openvino: the others by OpenVINO too.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    image = torch.randn(batch, 3, height, width)
    ours = build_backbone("tiny").eval()
    low = torch.bfloat16
    exact = {name: using(name, inference(ours, image)) for name in implementations()}
    exact[OPTIMISED] = inference(optimize_for_inference(ours), image)
    rough = {
        f"ours, {AUTOCAST}": inference(ours, image, low),
        f"{OPTIMISED}, bfloat16": inference(optimize_for_inference(ours, low), image),
    }
    rough |= in_int8(ours, lambda model: inference(model, image)())
    if image.is_cuda:
        exact[f"{OPTIMISED}, {GRAPH}"] = graphed(exact[OPTIMISED])
        rough[f"{OPTIMISED}, bfloat16, {GRAPH}"] = graphed(rough[f"{OPTIMISED}, bfloat16"])
        rough["ours, TF32"] = InContext(
            exact[NATIVE if NATIVE in exact else EAGER], partial(float32_precision, tf32=True)
        )
    if compile:
        exact["ours, torch.compile"] = _compiled(ours, image)
        rough[f"ours, torch.compile, {AUTOCAST}"] = _compiled(ours, image, low)
    candidates = _agreeing({**exact, **rough})
    for name, timm_name in PEERS.items():
        model = _peer(timm_name, height, width).eval()
        peer: Candidates = {name: _in_faster_format(model, image)}
        peer[f"{name}, {AUTOCAST}"] = _in_faster_format(copy.deepcopy(model), image, low)
        converted = copy.deepcopy(model).to(low)
        peer[f"{name}, bfloat16 weights"] = _in_faster_format(converted, image.to(low))
        if compile:
            peer[f"{name}, torch.compile"] = _compiled(model, image)
            compiled = _compiled(converted, image.to(low))
            peer[f"{name}, torch.compile, bfloat16 weights"] = compiled
        if openvino:
            peer[f"{name}, OpenVINO"] = in_openvino(model, image)
            peer[f"{name}, OpenVINO, bfloat16"] = in_openvino(model, image, low)
        candidates |= _agreeing(peer)
    return candidates


def _agreeing(candidates: Candidates) -> Candidates:
    """``candidates``, each compared with the first one, which is in float32."""
    (first_name, first), *others = candidates.items()
    reference = first()
    for name, candidate in others:
        dtype = torch.float32 if is_float32(name) else torch.bfloat16
        check_agreement({first_name: reference, name: candidate().float()}, TOLERANCE[dtype])
    return candidates


def _compiled(model: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32) -> Callable:
    """``torch.compile`` with frozen weights, under autocast to ``dtype``; compiles immediately."""
    from torch._inductor import config

    compiled = torch.compile(copy.deepcopy(model), dynamic=False)
    frozen = InContext(inference(compiled, image, dtype), partial(config.patch, freezing=True))
    frozen()
    return frozen


def training_candidates(batch: int, height: int, width: int) -> tuple[Candidates, dict[str, float]]:
    """Forward and backward of backbones, and the MB that each keeps for its backward pass."""
    image = torch.randn(batch, 3, height, width)
    ours = build_backbone("tiny")
    check_agreement(
        outputs_of({name: using(name, inference(ours.eval(), image)) for name in implementations()})
    )
    ours.train()
    models: dict[str, nn.Module] = dict.fromkeys(implementations(), ours)
    models |= {name: _peer(timm_name, height, width).train() for name, timm_name in PEERS.items()}
    candidates: Candidates = {}
    memory_mb: dict[str, float] = {}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, f", {AUTOCAST}")):
        for name, model in models.items():
            candidates[name + suffix] = using(name, training_step(model, image, dtype))
            forward = using(name, partial(_forward, model, image, dtype))
            memory_mb[name + suffix] = saved_bytes(model, forward) / 1e6
    if image.is_cuda:
        candidates[f"ours, {GRAPH}"] = graphed(training_step(ours, image))
    return candidates, memory_mb


def _forward(model: nn.Module, image: Tensor, dtype: torch.dtype) -> list[Tensor]:
    with autocast(image, dtype):
        return feature_maps(model(image))


def training_step(
    model: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Forward and backward from random gradients of all maps; under autocast as in inference.

    A sum of the maps would not do: they are normalised, so that its gradient is zero.
    """
    gradients = [torch.randn_like(output) for output in _forward(model, image, dtype)]

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(_forward(model, image, dtype), gradients)

    return step
