"""``spatial_mamba::depthwise_conv3x3_stride2``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.depthwise_conv3x3.op import check_convolution
from spatial_mamba_d2.ops.depthwise_conv3x3_stride2 import cuda, eager, reference

_NAME = "depthwise_conv3x3_stride2"


def _empty_output(x: Tensor, *_: Tensor) -> Tensor:
    batch, height, width, dim = x.shape
    return x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, dim))


_extension.define(
    _NAME,
    fake=_empty_output,
    eager=eager.depthwise_conv3x3_stride2,
    reference=reference.depthwise_conv3x3_stride2,
    eager_backward=eager.depthwise_conv3x3_stride2_backward,
    cuda=cuda.depthwise_conv3x3_stride2,
    cuda_backward=cuda.depthwise_conv3x3_stride2_backward,
)


def depthwise_conv3x3_stride2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise 3x3 convolution of stride 2 with zero padding, between two ReLUs.

    ``ReLU(bias[d] + sum_ij weight[d, 0, i, j] ReLU(x[2y + i - 1, 2x + j - 1, d]))``, which is what
    Spatial-Mamba's downsampling does between its two 1x1 convolutions.

    Args:
        x: ``Tensor[B, H, W, D]``; kernels copy it unless its channels are dense and its
            tokens evenly spaced, as in a slice of the channels of a contiguous map.
        weight: ``Tensor[D, 1, 3, 3]``.
        bias: ``Tensor[D]``.

    Returns:
        ``Tensor[B, ceil(H/2), ceil(W/2), D]``, contiguous, in the dtype of ``x``. Sums are float32
        (float64 for float64 ``x``). The backward pass keeps nothing but the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if not torch.jit.is_scripting():
        check_convolution(_NAME, x, weight, bias)
    return torch.ops.spatial_mamba.depthwise_conv3x3_stride2(x, weight, bias)
