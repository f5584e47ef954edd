"""Convolution, sum and norm written out: the truth that other kernels are tested against."""

from __future__ import annotations

from torch import Tensor

from spatial_mamba_d2.ops._precision import precise
from spatial_mamba_d2.ops.depthwise_conv3x3 import reference as conv_reference


def depthwise_conv3x3_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm`."""
    y = conv_reference.depthwise_conv3x3(x, weight, bias, residual=True)
    y_, norm_weight, norm_bias = precise(y, norm_weight, norm_bias)
    centred = y_ - y_.mean(-1, keepdim=True)
    normalized = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y, (normalized * norm_weight + norm_bias).to(x.dtype)
