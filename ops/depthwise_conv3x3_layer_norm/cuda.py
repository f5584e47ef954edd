"""``depthwise_conv3x3_layer_norm`` on CUDA devices: launches of the kernel in ``conv_norm.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    blocks_of,
    check_arguments,
    contiguous_as,
    float_bits,
)
from spatial_mamba_d2.ops.cuda.channels import (
    are_packed,
    channels_of_thread,
    cpp_bool,
    with_even_tokens,
)
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.cuda.source import constants
from spatial_mamba_d2.ops.cuda.team import Team
from spatial_mamba_d2.ops.depthwise_conv3x3 import cuda as conv

_SOURCE = "depthwise_conv3x3_layer_norm/conv_norm.cuh"
# By whether the channels of a thread are neighbours.
FORWARD = {
    packed: KernelSet(_SOURCE, conv_norm=f"conv3x3_norm<{{T}}, {cpp_bool(packed)}>")
    for packed in (True, False)
}


def depthwise_conv3x3_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm`."""
    op = "depthwise_conv3x3_layer_norm"
    conv.check(op, x, weight, bias)
    dim = (x.shape[3],)
    check_arguments(op, x, [("norm_weight", norm_weight, dim), ("norm_bias", norm_bias, dim)])
    acc = accumulation_dtype(x)
    x, stride = with_even_tokens(x)
    small = contiguous_as(acc, weight, bias, norm_weight, norm_bias)
    packed = are_packed(channels_of_thread(acc), stride, x, *small[2:])
    count = channels_of_thread(acc) // (1 if packed else 2)  # kConvNormPack
    team = Team.of(x.shape[3], acc, count)
    if team.warps > constants(_SOURCE)["kConvNormWarps"]:
        y = conv.depthwise_conv3x3(x, weight, bias, residual=True)
        norm_weight, norm_bias = contiguous_as(y.dtype, norm_weight, norm_bias)
        with torch.autocast(x.device.type, enabled=False):  # it would return float32
            return y, F.layer_norm(y, dim, norm_weight, norm_bias, eps)
    kernels = FORWARD[packed].on(x.device, x.dtype)
    y, norm = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if y.numel():
        across = blocks_of(x.shape[2], team.teams * conv.constant("kConvColumns"))
        least = conv.MIN_BAND_HEIGHT
        tiles = conv.cut(x.shape, stride, across, kernels.multiprocessors, least)
        members = (x, *small, y, norm, team.warps, float_bits(eps))
        blocks = tiles.images * tiles.bands * across
        kernels.conv_norm(blocks, team.block_warps, team.shared_bytes, *tiles, *members)
    return y, norm
