"""``spatial_mamba::depthwise_conv3x3`` on CUDA devices: launches of the kernels in ``conv.cuh``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spatial_mamba_d2.ops._checks import check_written
from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    LANES,
    blocks_of,
    check_arguments,
    check_map,
    contiguous_as,
)
from spatial_mamba_d2.ops.cuda.channels import (
    are_packed,
    channels_of_thread,
    copy_back,
    cpp_bool,
    memory_for,
    with_even_tokens,
)
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.cuda.source import constants

_SOURCE = "depthwise_conv3x3/conv.cuh"
# By whether the channels of a thread are neighbours.
FORWARD, BACKWARD = (
    {
        packed: KernelSet(
            _SOURCE,
            **{
                name: f"{kernel}<{{T}}, {cpp_bool(packed)}, {cpp_bool(residual)}>"
                for name, residual in (("residual", True), ("silu", False))
            },
        )
        for packed in (True, False)
    }
    for kernel in ("conv3x3", "conv3x3_backward")
)

# Enough blocks to fill a device. Every band reads two rows more than it has, so there are no more
# bands than that takes. Not tuned on a GPU.
BLOCKS_PER_MULTIPROCESSOR = 2
MIN_BAND_HEIGHT = 4
MIN_BACKWARD_BAND_HEIGHT = 8  # each block writes partial sums


@lru_cache(None)
def constant(name: str) -> int:
    """A constant of ``conv.cuh``."""
    return constants(_SOURCE)[name]


class ConvMap(NamedTuple):
    """How a map is cut: ``ConvMap`` of ``conv.cuh``, in the same order."""

    images: int
    height: int
    width: int
    dim: int
    stride: int
    band_height: int
    bands: int


def cut(
    shape: Sequence[int], stride: int, blocks_per_band: int, multiprocessors: int, least: int
) -> ConvMap:
    """Cut a map ``[B, H, W, D]`` into bands of at least that height for a device.

    Bands are as high as possible while there are enough blocks.
    """
    images, height, width, dim = shape
    columns = max(images * blocks_per_band, 1)
    wanted = blocks_of(multiprocessors * BLOCKS_PER_MULTIPROCESSOR, columns)
    band = max(blocks_of(height, wanted), least)
    return ConvMap(images, height, width, dim, stride, band, blocks_of(height, band))


def cut_backward(
    shape: Sequence[int], stride: int, count: int, multiprocessors: int
) -> tuple[ConvMap, int, int]:
    """The same for the backward pass; and the number of parts, and of blocks for each of them.

    Args:
        count: channels of a thread, :func:`backward_channels_of_thread`.
    """
    across = blocks_of(shape[2], constant("kConvWarps") * constant("kConvColumns"))
    lanes = blocks_of(shape[3], LANES * count)
    tiles = cut(shape, stride, across * lanes, multiprocessors, MIN_BACKWARD_BAND_HEIGHT)
    return tiles, tiles.images * tiles.bands * across, lanes


def backward_channels_of_thread(acc: torch.dtype, packed: bool) -> int:
    """``kConvBackwardPack``."""
    return channels_of_thread(acc) // 2 if packed else 1


def check(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ``ValueError`` unless these fit together."""
    check_map(op, "x", x)
    dim = x.shape[3]
    check_arguments(op, x, [("weight", weight, (dim, 1, 3, 3)), ("bias", bias, (dim,))])


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3`."""
    check("depthwise_conv3x3", x, weight, bias)
    acc = accumulation_dtype(x)
    x, stride = with_even_tokens(x)
    count = channels_of_thread(acc)
    kernels = FORWARD[are_packed(count, stride, x)].on(x.device, x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        width, dim = x.shape[2:]
        threads = blocks_of(dim, count) * blocks_of(width, constant("kConvColumns"))
        warps = constant("kConvWarps")
        blocks = blocks_of(threads, warps * LANES)
        tiles = cut(x.shape, stride, blocks, kernels.multiprocessors, MIN_BAND_HEIGHT)
        launch = kernels.residual if residual else kernels.silu
        members = (x, *contiguous_as(acc, weight, bias), out)
        launch(tiles.images * tiles.bands * blocks, warps, 0, *tiles, *members)
    return out


def depthwise_conv3x3_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias."""
    op = "depthwise_conv3x3_backward"
    check(op, x, weight, bias)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    written = (grad_x, x.shape[3])
    return grad_x, *_write_gradients(op, written, grad_output, x, weight, bias, residual)


def depthwise_conv3x3_gradients_(
    grad_x: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_gradients_`."""
    op = "depthwise_conv3x3_gradients_"
    check(op, x, weight, bias)
    check_arguments(op, x, [("grad_x", grad_x, x.shape)])
    check_written(op, "grad_x", grad_x, "x", x)
    written = memory_for(grad_x, x.dtype)
    gradients = _write_gradients(op, written, grad_output, x, weight, bias, residual)
    copy_back(grad_x, written[0])
    return gradients


def _write_gradients(
    op: str,
    written: tuple[Tensor, int],
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of x; return those of weight and bias.

    Args:
        written: memory for the gradient of x, in its dtype, and the distance from token to token.
    """
    grad_x, grad_x_stride = written
    check_arguments(op, x, [("grad_output", grad_output, x.shape)])
    acc = accumulation_dtype(x)
    x, stride = with_even_tokens(x)
    (grad,) = contiguous_as(x.dtype, grad_output)
    count = backward_channels_of_thread(acc, packed=True)
    packed = are_packed(count, stride, x, grad) and are_packed(count, grad_x_stride, grad_x)
    count = backward_channels_of_thread(acc, packed)
    kernels = BACKWARD[packed].on(x.device, x.dtype)
    tiles, parts, lanes = cut_backward(x.shape, stride, count, kernels.multiprocessors)
    dim = tiles.dim
    grad_weight = torch.empty((parts, *weight.shape), dtype=acc, device=x.device)
    grad_bias = torch.empty((parts, dim), dtype=acc, device=x.device)
    if parts:
        launch = kernels.residual if residual else kernels.silu
        warps = constant("kConvWarps")
        shared_bytes = warps * LANES * 10 * count * acc.itemsize
        outputs = (grad_x, grad_weight, grad_bias, grad_x_stride)
        members = (x, *contiguous_as(acc, weight, bias), grad, *outputs)
        launch(parts * lanes, warps, shared_bytes, *tiles, *members)
    return grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)
