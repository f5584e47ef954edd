"""Our operators in plain PyTorch, in forms that ``torch.export`` and ONNX have for all sizes.

:func:`portable_copy` makes a model of them, over the same weights. Its graph has no operator of
ours, and takes any batch, height and width. It is for export: in PyTorch itself it is slow.

The scan ``h_t = a_t h_{t-1} + b_t`` over all H W tokens is two loops: over the columns, for all
rows at once, then over the rows, for what one row hands on to the next. A loop becomes one ``Scan``
of ONNX. Cumulative sums would need no loop, but their exponentials overflow on rows of 200 tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from spatial_mamba_d2.models.layers import (
    DepthwiseConv,
    ExpandingConv,
    HalvingConv,
    PointwiseConv,
    nchw,
    nhwc,
)
from spatial_mamba_d2.models.pointwise import Pointwise, plain_linear
from spatial_mamba_d2.models.ssm import StructureAwareSSM
from spatial_mamba_d2.models.upernet import UPerHead
from spatial_mamba_d2.ops.state_fusion.taps import DILATIONS, RADIUS, split_taps

Step = Callable[[Any, Any], tuple[Any, Any]]


def linear_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """Solve ``h_t = decay_t h_{t-1} + drive_t``, ``h_{-1} = 0``, in raster order.

    Args:
        decay, drive: ``Tensor[B, H, W, D]``.

    Returns:
        h, ``Tensor[B, H, W, D]``.
    """

    def along_row(state: Any, x: Any) -> Any:
        product, h = state[0] * x[0], state[1] * x[0] + x[1]
        return (product, h), (product.clone(), h.clone())  # outputs must not share memory

    def down_rows(h: Any, x: Any) -> Any:
        return h * x[0] + x[1], h.clone()  # what enters the row

    batch, height, _, dim = drive.shape
    # New tensors, because the loop compares the strides of its state before and after a step.
    ones, zeros = drive.new_ones(batch, height, dim), drive.new_zeros(batch, height, dim)
    _, (product, h) = _loop(along_row, (ones, zeros), (decay, drive), dim=2)
    ends = (product[:, :, -1], h[:, :, -1])
    _, entering = _loop(down_rows, drive.new_zeros(batch, dim), ends, dim=1)
    return h + product * entering.unsqueeze(2)


def _loop(step: Step, state: Any, inputs: tuple[Tensor, ...], dim: int) -> tuple[Any, Any]:
    """PyTorch's ``scan`` in a graph; outside of one, where it would compile, the same in Python."""
    if torch.compiler.is_compiling():
        return scan(step, state, inputs, dim=dim)
    outputs = []
    for x in zip(*(t.unbind(dim) for t in inputs), strict=True):
        state, output = step(state, x)
        outputs.append(output)
    if isinstance(outputs[0], tuple):
        return state, tuple(torch.stack(y, dim) for y in zip(*outputs, strict=True))
    return state, torch.stack(outputs, dim)


def state_fusion(h: Tensor, kernels: list[Tensor]) -> Tensor:
    """:func:`spatial_mamba_d2.ops.state_fusion`, by a depthwise convolution for each dilation.

    Args:
        h: ``Tensor[B, H, W, D]``.
        kernels: ``Tensor[D, 1, 3, 3]`` for each of ``DILATIONS``, from ``split_taps``.
    """
    height, width, dim = h.shape[1:]
    x = F.pad(nchw(h), (RADIUS,) * 4, mode="replicate")
    fused = []
    for dilation, kernel in zip(DILATIONS, kernels, strict=True):
        cut = RADIUS - dilation  # what this dilation does not reach
        part = x[:, :, cut : height + RADIUS + dilation, cut : width + RADIUS + dilation]
        fused.append(F.conv2d(part, kernel, dilation=dilation, groups=dim))
    return nhwc(reduce(torch.add, fused))


def structure_aware_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    kernels: list[Tensor],
) -> Tensor:
    """:func:`spatial_mamba_d2.ops.structure_aware_ssm`, with the kernels of the fusion."""
    step = F.softplus(delta + delta_bias)
    h = linear_recurrence((step * A).exp(), step * u * B.unsqueeze(-1))
    return state_fusion(h, kernels) * C.unsqueeze(-1) + u * D


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    """:func:`spatial_mamba_d2.ops.depthwise_conv3x3`."""
    y = nhwc(F.conv2d(nchw(x), weight, bias, padding=1, groups=x.shape[-1]))
    return x + y if residual else F.silu(y)


def gated_layer_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """:func:`spatial_mamba_d2.ops.gated_layer_norm`."""
    return F.layer_norm(y, y.shape[-1:], weight, bias, eps) * F.silu(z)


def adaptive_avg_pool2d(x: Tensor, size: int) -> Tensor:
    """``F.adaptive_avg_pool2d``, which ONNX does not have for all sizes, as matrix products.

    Args:
        x: ``Tensor[B, C, H, W]``.

    Returns:
        ``Tensor[B, C, size, size]``.
    """
    rows, columns = (_bins(length, size, x) for length in x.shape[-2:])
    return rows @ x @ columns.t()


def _bins(length: int, number: int, like: Tensor) -> Tensor:
    """Weights of the mean over each of ``number`` bins: ``Tensor[number, length]``."""
    position = torch.arange(length, device=like.device)
    index = torch.arange(number, device=like.device).unsqueeze(1)
    start = torch.div(index * length, number, rounding_mode="floor")
    end = torch.div((index + 1) * length + number - 1, number, rounding_mode="floor")
    inside = (position >= start) & (position < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


class PortableConv(nn.Module):
    """:class:`~spatial_mamba_d2.models.layers.DepthwiseConv`."""

    def __init__(self, conv: DepthwiseConv):
        super().__init__()
        self.weight, self.bias, self.residual = conv.weight, conv.bias, conv.residual

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv3x3(x, self.weight, self.bias, self.residual)


def _plain_conv(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution itself, which is a copy, without what its subclass does."""
    conv.__class__ = nn.Conv2d
    return conv


def _halving_layers(conv: HalvingConv) -> nn.Sequential:
    """:class:`~spatial_mamba_d2.models.layers.HalvingConv`."""
    return nn.Sequential(nn.ReLU(), _plain_conv(conv), nn.ReLU())


class PortableSSM(nn.Module):
    """:class:`~spatial_mamba_d2.models.ssm.StructureAwareSSM`, A and taps computed."""

    A: Tensor

    def __init__(self, ssm: StructureAwareSSM):
        super().__init__()
        self.in_proj, self.x_proj, self.dt_proj, self.out_proj = map(
            plain_linear, (ssm.in_proj, ssm.x_proj, ssm.dt_proj, ssm.out_proj)
        )
        self.conv = PortableConv(ssm.conv)
        self.split_sizes = ssm.split_sizes
        self.dt_bias, self.D, self.out_norm = ssm.dt_bias, ssm.D, ssm.out_norm
        with torch.no_grad():
            self.register_buffer("A", -torch.exp(ssm.A_log.float().flatten()))
            for dilation, kernel in zip(DILATIONS, split_taps(ssm.fusion()), strict=True):
                self.register_buffer(f"kernel_d{dilation}", kernel.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # [B, H, W, D] each
        u = self.conv(u)
        dt, B, C = self.x_proj(u).split(self.split_sizes, dim=-1)
        kernels = [self.get_buffer(f"kernel_d{dilation}") for dilation in DILATIONS]
        y = structure_aware_ssm(
            u, self.dt_proj(dt), self.A, B.squeeze(-1), C.squeeze(-1), self.D, self.dt_bias, kernels
        )
        norm = self.out_norm
        return self.out_proj(gated_layer_norm(y, z, norm.weight, norm.bias, norm.eps))


class PortableUPerHead(UPerHead):
    """:class:`~spatial_mamba_d2.models.upernet.UPerHead`."""

    def pool(self, x: Tensor, size: int) -> Tensor:
        return adaptive_avg_pool2d(x, size)


def _portable_head(head: UPerHead) -> UPerHead:
    """The head itself, which is a copy, in another class."""
    head.__class__ = PortableUPerHead
    return head


_PORTABLE: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    DepthwiseConv: PortableConv,
    HalvingConv: _halving_layers,
    PointwiseConv: _plain_conv,
    ExpandingConv: _plain_conv,
    Pointwise: plain_linear,
    StructureAwareSSM: PortableSSM,
    UPerHead: _portable_head,
}


def portable_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode, of standard operators only, that shares its weights.

    What is computed from weights, A and the taps of the state fusion, is computed now: after a
    change of the weights, make another copy. It is for float32, in which states and sums of the
    original are.

    Args:
        model: a backbone, classifier, UPerNet or detector in float32.

    Raises:
        ValueError: a weight has another dtype.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"model must be float32 for export, got {parameter.dtype} in {name}")
    shared = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    portable = copy.deepcopy(model, shared).eval()
    _replace_children(portable)
    return portable


def _replace_children(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if type(child) in _PORTABLE:
            child = _PORTABLE[type(child)](child)
            setattr(module, name, child)
        _replace_children(child)
