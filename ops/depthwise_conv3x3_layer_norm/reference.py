"""Convolution, sum and norm written out: what every other kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops.depthwise_conv3x3 import reference as conv_reference


def depthwise_conv3x3_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = conv_reference.depthwise_conv3x3(x, weight, bias, residual=True)
    centred = y.to(dtype) - y.to(dtype).mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y, (normalised * norm_weight.to(dtype) + norm_bias.to(dtype)).to(x.dtype)
