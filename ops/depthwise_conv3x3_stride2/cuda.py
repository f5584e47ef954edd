"""``depthwise_conv3x3_stride2`` on CUDA devices: launches the kernels in ``conv_stride2.cuh``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    LANES,
    blocks_of,
    check_arguments,
    contiguous_as,
)
from spatial_mamba_d2.ops.cuda.channels import (
    are_packed,
    channels_of_thread,
    cpp_bool,
    with_even_tokens,
)
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.depthwise_conv3x3 import cuda as conv

# By whether the channels of a thread are neighbours.
FORWARD, BACKWARD = (
    {
        packed: KernelSet(
            "depthwise_conv3x3_stride2/conv_stride2.cuh",
            conv=f"{kernel}<{{T}}, {cpp_bool(packed)}>",
        )
        for packed in (True, False)
    }
    for kernel in ("conv3x3_stride2", "conv3x3_stride2_backward")
)


def _halved(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The shape of the output."""
    images, height, width, dim = shape
    return images, blocks_of(height, 2), blocks_of(width, 2), dim


def _cut(
    shape: Sequence[int], stride: int, blocks_per_band: int, multiprocessors: int, least: int
) -> conv.ConvMap:
    """A map, in bands of rows of the output."""
    bands = conv.cut(_halved(shape), stride, blocks_per_band, multiprocessors, least)
    return bands._replace(height=shape[1], width=shape[2])


def depthwise_conv3x3_stride2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_stride2`."""
    conv.check("depthwise_conv3x3_stride2", x, weight, bias)
    acc = accumulation_dtype(x)
    x, stride = with_even_tokens(x)
    packed = are_packed(channels_of_thread(acc), stride, x)
    count = channels_of_thread(acc) // (1 if packed else 2)  # kStride2Pack
    kernels = FORWARD[packed].on(x.device, x.dtype)
    shape = _halved(x.shape)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.numel():
        threads = blocks_of(shape[3], count) * blocks_of(shape[2], conv.constant("kConvColumns"))
        warps = conv.constant("kConvWarps")
        blocks = blocks_of(threads, warps * LANES)
        tiles = _cut(x.shape, stride, blocks, kernels.multiprocessors, conv.MIN_BAND_HEIGHT)
        members = (x, *contiguous_as(acc, weight, bias), out)
        kernels.conv(tiles.images * tiles.bands * blocks, warps, 0, *tiles, *members)
    return out


def cut_backward(
    shape: Sequence[int], stride: int, count: int, multiprocessors: int
) -> tuple[conv.ConvMap, int, int]:
    """The same for the backward pass; and the number of parts, and of blocks for each of them.

    Args:
        count: channels of a thread, :func:`.depthwise_conv3x3.cuda.backward_channels_of_thread`.
    """
    across = blocks_of(_halved(shape)[2], conv.constant("kConvWarps"))
    lanes = blocks_of(shape[3], LANES * count)
    tiles = _cut(shape, stride, across * lanes, multiprocessors, conv.MIN_BACKWARD_BAND_HEIGHT)
    return tiles, tiles.images * tiles.bands * across, lanes


def depthwise_conv3x3_stride2_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias."""
    op = "depthwise_conv3x3_stride2_backward"
    conv.check(op, x, weight, bias)
    check_arguments(op, x, [("grad_output", grad_output, _halved(x.shape))])
    acc = accumulation_dtype(x)
    x, stride = with_even_tokens(x)
    (grad,) = contiguous_as(x.dtype, grad_output)
    packed = are_packed(conv.backward_channels_of_thread(acc, packed=True), stride, x, grad)
    count = conv.backward_channels_of_thread(acc, packed)
    kernels = BACKWARD[packed].on(x.device, x.dtype)
    tiles, parts, lanes = cut_backward(x.shape, stride, count, kernels.multiprocessors)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weight = torch.empty((parts, *weight.shape), dtype=acc, device=x.device)
    grad_bias = torch.empty((parts, tiles.dim), dtype=acc, device=x.device)
    if parts:
        warps = conv.constant("kConvWarps")
        shared_bytes = warps * LANES * 10 * count * acc.itemsize
        members = (x, *contiguous_as(acc, weight, bias), grad, grad_x, grad_weight, grad_bias)
        kernels.conv(parts * lanes, warps, shared_bytes, *tiles, *members)
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)
