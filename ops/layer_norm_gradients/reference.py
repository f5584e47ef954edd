"""The norm and its derivative written out: the truth that other kernels are tested against."""

from __future__ import annotations

from torch import Tensor

from spatial_mamba_d2.ops._precision import precise


def layer_norm_gradients(
    grad_output: Tensor, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.layer_norm_gradients`."""
    x_, grad, residual, weight, bias = precise(x, grad_output, residual, weight, bias)
    centred = x_ - x_.mean(-1, keepdim=True)
    scale = 1 / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    normalized = centred * scale
    grad_normalized = grad * weight
    shift = grad_normalized.mean(-1, keepdim=True)
    slope = (grad_normalized * normalized).mean(-1, keepdim=True)
    grad_x = residual + scale * (grad_normalized - shift - normalized * slope)
    output = normalized * weight + bias
    grad_weight = (grad * normalized).sum(dim=(0, 1, 2))
    return grad_x.to(x.dtype), output.to(x.dtype), grad_weight, grad.sum(dim=(0, 1, 2))
