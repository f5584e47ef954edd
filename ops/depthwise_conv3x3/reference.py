"""The convolution as nine shifted multiply-adds: the truth that kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3`."""
    x_, weight, bias = precise(x, weight, bias)
    height, width = x.shape[1:3]
    padded = torch.nn.functional.pad(x_, (0, 0, 1, 1, 1, 1))
    conv = bias
    for i in range(3):
        for j in range(3):
            conv = conv + weight[:, 0, i, j] * padded[:, i : i + height, j : j + width]
    out = x_ + conv if residual else conv * torch.sigmoid(conv)
    return out.to(x.dtype)
