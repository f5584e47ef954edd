"""The norm, its gradients and the sum by PyTorch's own operators, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype, precise_inside


def layer_norm_gradients(
    grad_output: Tensor, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.layer_norm_gradients`."""
    grad, residual = grad_output.to(x.dtype), residual.to(x.dtype)
    x_, grad, weight, bias = precise_inside(x, grad, weight, bias)
    shape = x.shape[-1:]
    output, mean, rstd = torch.native_layer_norm(x_, shape, weight, bias, eps)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, x_, shape, mean, rstd, weight, bias, [True, True, True]
    )
    sums = accumulation_dtype(x)
    return (
        (grad_x + residual).to(x.dtype).contiguous(),
        output.to(x.dtype).contiguous(),
        grad_weight.to(sums),
        grad_bias.to(sums),
    )
