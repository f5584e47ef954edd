"""What the grid compares: our operators, layers and backbone, each with plain PyTorch's.

Each subject builds a pair of calls that must agree for one setting, on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2 import ops
from spatial_mamba_d2.models import (
    SpatialMambaBackbone,
    build_backbone,
    optimize_for_inference,
)
from spatial_mamba_d2.models.layers import nchw, nhwc
from spatial_mamba_d2.models.packed import PackedLinear, packed_conv
from spatial_mamba_d2.models.pointwise import pointwise
from spatial_mamba_d2.profiling.backbone_candidates import inference, training_step
from spatial_mamba_d2.profiling.candidates import EAGER, using

FORWARD, TRAINING = "forward", "training"
#: of the tiny variant, by what each stage divides the image's size
WIDTHS = {4: 64, 32: 512}
#: of a feature pyramid
PYRAMID_WIDTH = 256
NUM_BOXES = 64  # of RoIAlign, per image


@dataclass(frozen=True)
class Setting:
    """What a subject is measured at.

    Args:
        step: ``FORWARD``, or ``TRAINING``, forward and backward.
        dtype: float32 or bfloat16; networks get it by autocast or by optimisation.
        threads: PyTorch's number of threads.
        batch, height, width: of the images; operators get maps of 1/4 and 1/32 of their size.
    """

    step: str
    dtype: torch.dtype
    threads: int
    batch: int
    height: int
    width: int

    @property
    def num_pixels(self) -> int:
        return self.batch * self.height * self.width


Outputs = Tensor | tuple[Tensor, ...]
Call = Callable[[], Outputs]
Pair = tuple[Call, Call]  # ours and plain PyTorch's


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Args:
        name: in the table.
        build: from a setting to two calls.
        max_pixels: of the batch, by step; larger settings would take too long, and steps without an
            entry do not exist.
    """

    name: str
    build: Callable[[Setting], Pair]
    max_pixels: dict[str, int]


def _calls(
    setting: Setting, ours: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor
) -> Pair:
    """Both functions of ``inputs``, or the gradients of all of them."""

    def forward(function: Callable[..., Any]) -> Any:
        with torch.no_grad():
            return function(*inputs)

    if setting.step == FORWARD:
        return partial(forward, ours), partial(forward, plain)
    leaves = [x.clone().requires_grad_() for x in inputs]
    cotangent = torch.randn_like(forward(ours))

    def training(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, cotangent)

    return partial(training, ours), partial(training, plain)


def _with_plain_operators(setting: Setting, function: Callable[..., Any], *inputs: Tensor) -> Pair:
    ours, _ = _calls(setting, function, function, *inputs)
    return ours, using(EAGER, ours)


def _map(setting: Setting, stride: int, width: int) -> Tensor:
    """``Tensor[B, H / stride, W / stride, width]``."""
    height, width_px = (-(-size // stride) for size in (setting.height, setting.width))
    return torch.randn(setting.batch, height, width_px, width, dtype=setting.dtype)


def _ssm_inputs(setting: Setting, stride: int) -> list[Tensor]:
    """Of ``structure_aware_ssm``: u, delta, A, B, C, D, delta_bias, taps."""
    dim = 2 * WIDTHS[stride]
    u, delta = (_map(setting, stride, dim) for _ in range(2))
    B, C = (_map(setting, stride, 1).squeeze(-1) for _ in range(2))
    return [u, delta, -torch.rand(dim), B, C, torch.randn(dim), torch.randn(dim) - 3,
            0.2 * torch.randn(25, dim)]  # fmt: skip


def _ssm(stride: int, setting: Setting) -> Pair:
    inputs = _ssm_inputs(setting, stride)
    return _with_plain_operators(setting, ops.structure_aware_ssm, *inputs)


def _scan(stride: int, setting: Setting) -> Pair:
    u, delta, A, B, _, _, bias, _ = _ssm_inputs(setting, stride)
    flat = [x.flatten(1, 2) for x in (u, delta, B)]
    return _with_plain_operators(setting, ops.selective_scan, *flat[:2], A, flat[2], bias)


def _fusion(stride: int, setting: Setting) -> Pair:
    h, *_, taps = _ssm_inputs(setting, stride)
    return _with_plain_operators(setting, ops.state_fusion, h, taps)


def _depthwise(stride: int, setting: Setting) -> Pair:
    dim = 2 * WIDTHS[stride]
    x, weight, bias = _map(setting, stride, dim), torch.randn(dim, 1, 3, 3), torch.randn(dim)
    convolve = partial(ops.depthwise_conv3x3, residual=False)
    return _with_plain_operators(setting, convolve, x, weight, bias)


def _depthwise_norm(stride: int, setting: Setting) -> Pair:
    dim = WIDTHS[stride]
    x, weight = _map(setting, stride, dim), torch.randn(dim, 1, 3, 3)
    vectors = torch.randn(3, dim)
    return _with_plain_operators(setting, ops.depthwise_conv3x3_layer_norm, x, weight, *vectors)


def _gate(stride: int, setting: Setting) -> Pair:
    dim = 2 * WIDTHS[stride]
    y, z = (_map(setting, stride, dim) for _ in range(2))
    return _with_plain_operators(setting, ops.gated_layer_norm, y, z, *torch.randn(2, dim))


def _gelu_gradients(stride: int, setting: Setting) -> Pair:
    grad, x = (_map(setting, stride, 4 * WIDTHS[stride]) for _ in range(2))
    return _with_plain_operators(setting, ops.gelu_gradients, grad, x)


def _norm_gradients(stride: int, setting: Setting) -> Pair:
    dim = WIDTHS[stride]
    maps = [_map(setting, stride, dim) for _ in range(3)]
    return _with_plain_operators(setting, ops.layer_norm_gradients, *maps, *torch.randn(2, dim))


def _linear_inputs(setting: Setting, stride: int, sizes: tuple[int, int]) -> list[Tensor]:
    """Of a layer with ``sizes``: x, weight, bias, all in the setting's dtype, as by autocast."""
    before, after = sizes
    x, weight, bias = _map(setting, stride, before), torch.randn(after, before), torch.randn(after)
    return [x, (weight * before**-0.5).to(x.dtype), bias.to(x.dtype)]


def _linear(stride: int, setting: Setting, sizes: tuple[int, int]) -> Pair:
    return _calls(setting, pointwise, F.linear, *_linear_inputs(setting, stride, sizes))


def _packed_linear(stride: int, setting: Setting) -> Pair:
    width = WIDTHS[stride]
    x, weight, bias = _linear_inputs(setting, stride, (width, 4 * width))
    packed = PackedLinear(weight, bias)
    return _calls(setting, packed, lambda x: F.linear(x, weight, bias), x)


def _packed_conv(stride: int, setting: Setting) -> Pair:
    conv = nn.Conv2d(PYRAMID_WIDTH, PYRAMID_WIDTH, 3, padding=1).requires_grad_(False)
    ours = packed_conv(conv, setting.dtype)
    plain = conv.to(setting.dtype).to(memory_format=torch.channels_last)
    return _calls(setting, ours, plain, nchw(_map(setting, stride, PYRAMID_WIDTH)))


def _roi_align(setting: Setting) -> Pair:
    x = _map(setting, 4, PYRAMID_WIDTH)
    corners = torch.rand(setting.batch * NUM_BOXES, 2, 2)
    corners *= torch.tensor([setting.width, setting.height])
    image = torch.arange(len(corners)) // NUM_BOXES
    boxes = torch.cat((image[:, None], corners.amin(dim=1), corners.amax(dim=1)), dim=1)

    def ours(x: Tensor) -> Tensor:
        return ops.roi_align(x, boxes, 7, 7, scale=0.25)

    def plain(x: Tensor) -> Tensor:  # x has the pyramid's layout
        return nhwc(torchvision.ops.roi_align(nchw(x).float(), boxes, 7, 0.25, aligned=True))

    return _calls(setting, ours, plain, x)


@cache
def _network() -> SpatialMambaBackbone:
    """Without what is random, and batch norms that accept maps of one pixel."""
    return build_backbone("tiny", bn_policy="frozen", drop_path_rate=0.0)


@cache
def _optimised_network(dtype: torch.dtype) -> nn.Module:
    return optimize_for_inference(_network(), dtype)


def _backbone(setting: Setting) -> Pair:
    image = torch.randn(setting.batch, 3, setting.height, setting.width)
    model = _network()
    if setting.step == FORWARD:
        forward = inference(model.eval(), image, setting.dtype)
        return forward, using(EAGER, forward)
    step = training_step(model.train(), image, setting.dtype)

    def training() -> Tensor:
        step()
        gradient = model.stem.conv1.conv.weight.grad  # depends on all others
        assert gradient is not None
        return gradient.clone()

    return training, using(EAGER, training)


def _optimised_backbone(setting: Setting) -> Pair:
    image = torch.randn(setting.batch, 3, setting.height, setting.width)
    ours = inference(_optimised_network(setting.dtype), image)
    return ours, using(EAGER, inference(_network().eval(), image, setting.dtype))


_LARGE = 640 * 896
_OPERATOR = {FORWARD: _LARGE, TRAINING: _LARGE}
_NETWORK = {FORWARD: _LARGE, TRAINING: 8 * 224 * 224}


def _subjects() -> tuple[Subject, ...]:
    found = []
    for (stride, width), stage in zip(WIDTHS.items(), ("res2", "res5"), strict=True):
        few = width // 16 + 2  # what each token of the SSM selects
        for name, build, max_pixels in (
            ("structure_aware_ssm", _ssm, _OPERATOR),
            ("selective_scan", _scan, _OPERATOR),
            ("state_fusion", _fusion, _OPERATOR),
            ("depthwise_conv3x3", _depthwise, _OPERATOR),
            ("gated_layer_norm", _gate, _OPERATOR),
            ("depthwise_conv3x3_layer_norm", _depthwise_norm, {FORWARD: _LARGE}),
            ("gelu_gradients", _gelu_gradients, {FORWARD: _LARGE}),
            ("layer_norm_gradients", _norm_gradients, {FORWARD: _LARGE}),
            ("linear layer, C to 4 C", partial(_linear, sizes=(width, 4 * width)), _OPERATOR),
            ("linear layer, 4 C to C", partial(_linear, sizes=(4 * width, width)), _OPERATOR),
            ("linear layer, 2 C to C/16 + 2", partial(_linear, sizes=(2 * width, few)), _OPERATOR),
            ("optimised linear layer", _packed_linear, {FORWARD: _LARGE}),
            ("optimised 3x3 convolution", _packed_conv, {FORWARD: _LARGE}),
        ):
            found.append(Subject(f"{name}, {stage}", partial(build, stride), max_pixels))
    return (
        *found,
        Subject("roi_align, res2", _roi_align, _OPERATOR),
        Subject("backbone", _backbone, _NETWORK),
        Subject("optimised backbone", _optimised_backbone, {FORWARD: _LARGE}),
    )


SUBJECTS = _subjects()
