"""The convolution written out: the truth that other kernels are tested against."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import precise


def depthwise_conv3x3_stride2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_stride2`."""
    x_, weight, bias = precise(x, weight, bias)
    # One more row and column, so that an odd size is as an even one.
    padded = F.pad(x_.clamp(min=0), (0, 0, 1, 2, 1, 2))
    height, width = ((size + 1) // 2 * 2 for size in x.shape[1:3])
    conv = bias
    for i in range(3):
        for j in range(3):
            conv = conv + weight[:, 0, i, j] * padded[:, i : i + height : 2, j : j + width : 2]
    return conv.clamp(min=0).to(x.dtype)
