"""The convolution as nine shifted multiply-adds: the truth that kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3`."""
    dtype = accumulation_dtype(x)
    height, width = x.shape[1:3]
    padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 1, 1, 1, 1))
    conv = bias.to(dtype)
    for i in range(3):
        for j in range(3):
            conv = conv + weight[:, 0, i, j].to(dtype) * padded[:, i : i + height, j : j + width]
    out = x.to(dtype) + conv if residual else conv * torch.sigmoid(conv)
    return out.to(x.dtype)
