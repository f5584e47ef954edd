"""The depthwise convolution by PyTorch's own, on a channels-last view.

Nothing but the inputs is kept for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import precise_inside, without_tf32


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``Tensor[B, H, W, D]`` -> ``Tensor[B, H, W, D]``."""
    with without_tf32(x):
        conv = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1])
    return conv.permute(0, 2, 3, 1)


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3`."""
    x_, weight, bias = precise_inside(x, weight, bias)
    conv = _convolve(x_, weight, bias)
    out = x_ + conv if residual else F.silu(conv)
    return out.to(x.dtype).contiguous()


def differentiable_depthwise_conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> Tensor:
    """:func:`depthwise_conv3x3`, whose gradient has forward-mode derivatives; SiLU's has none."""
    x_, weight, bias = precise_inside(x, weight, bias)
    conv = _convolve(x_, weight, bias)
    out = x_ + conv if residual else conv * torch.sigmoid(conv)
    return out.to(x.dtype).contiguous()


def depthwise_conv3x3_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias."""
    x_, weight_, bias_, grad_output = precise_inside(x, weight, bias, grad_output)
    dim = x.shape[-1]
    grad_conv = grad_output
    if not residual:
        grad_conv = torch.ops.aten.silu_backward(grad_output, _convolve(x_, weight_, bias_))
    with without_tf32(x):
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_conv.permute(0, 3, 1, 2),
            x_.permute(0, 3, 1, 2),
            weight_,
            [dim],
            stride=[1, 1],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=dim,
            output_mask=[True, True, True],
        )
    grad_x = grad_x.permute(0, 2, 3, 1)
    if residual:
        grad_x = grad_x + grad_output
    return (
        grad_x.to(x.dtype).contiguous(),
        # With the strides of a parameter: those of an axis of size 1 may differ, which DDP notices.
        grad_weight.to(weight.dtype).reshape(-1).view(weight.shape),
        grad_bias.to(bias.dtype),
    )


def depthwise_conv3x3_gradients_(
    grad_x: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_gradients_`."""
    gradients = depthwise_conv3x3_backward(grad_output, x, weight, bias, residual)
    grad_x.copy_(gradients[0])
    return gradients[1:]
