"""The convolution and both ReLUs by PyTorch's own, on a channels-last view.

Nothing but the inputs is kept for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import precise_inside, without_tf32


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``Tensor[B, H, W, D]`` -> ``Tensor[B, ceil(H/2), ceil(W/2), D]``."""
    with without_tf32(x):
        conv = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 2, 1, groups=x.shape[-1])
    return conv.permute(0, 2, 3, 1)


def depthwise_conv3x3_stride2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_stride2`."""
    x_, weight, bias = precise_inside(x, weight, bias)
    return F.relu(_convolve(F.relu(x_), weight, bias)).to(x.dtype).contiguous()


def depthwise_conv3x3_stride2_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias."""
    x_, weight_, bias_, grad = precise_inside(x, weight, bias, grad_output)
    positive = F.relu(x_)
    grad_conv = torch.ops.aten.threshold_backward(grad, _convolve(positive, weight_, bias_), 0)
    with without_tf32(x):
        grad_positive, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_conv.permute(0, 3, 1, 2),
            positive.permute(0, 3, 1, 2),
            weight_,
            [x.shape[-1]],
            stride=[2, 2],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=x.shape[-1],
            output_mask=[True, True, True],
        )
    grad_x = torch.ops.aten.threshold_backward(grad_positive.permute(0, 2, 3, 1), x_, 0)
    return (
        grad_x.to(x.dtype).contiguous(),
        # With the strides of a parameter: those of an axis of size 1 may differ, which DDP notices.
        grad_weight.to(weight.dtype).reshape(-1).view(weight.shape),
        grad_bias.to(bias.dtype),
    )
