"""PyTorch's own convolution and norm, one after the other."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import precise_inside
from spatial_mamba_d2.ops.depthwise_conv3x3 import eager as conv_eager


def depthwise_conv3x3_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm`."""
    y = conv_eager.depthwise_conv3x3(x, weight, bias, residual=True)
    y_, norm_weight, norm_bias = precise_inside(y, norm_weight, norm_bias)
    norm = F.layer_norm(y_, y_.shape[-1:], norm_weight, norm_bias, eps)
    return y, norm.to(x.dtype)
