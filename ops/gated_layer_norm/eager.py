"""Norm and gate by PyTorch's own operators; the backward pass recomputes the norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import precise_inside


def gated_layer_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.gated_layer_norm`."""
    y_, z_, weight, bias = precise_inside(y, z, weight, bias)
    norm = F.layer_norm(y_, y_.shape[-1:], weight, bias, eps)
    return (norm * F.silu(z_)).to(y.dtype).contiguous()


def differentiable_gated_layer_norm(
    y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """:func:`gated_layer_norm`, whose gradient has forward-mode derivatives; SiLU's has none."""
    y_, z_, weight, bias = precise_inside(y, z, weight, bias)
    norm = F.layer_norm(y_, y_.shape[-1:], weight, bias, eps)
    return (norm * z_ * torch.sigmoid(z_)).to(y.dtype).contiguous()


def gated_layer_norm_backward(
    grad_output: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, z, weight, bias."""
    y_, z_, weight_, bias_, grad = precise_inside(y, z, weight, bias, grad_output)
    norm, mean, rstd = torch.native_layer_norm(y_, y_.shape[-1:], weight_, bias_, eps)
    grad_z = torch.ops.aten.silu_backward(grad * norm, z_)
    grad_y, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad * F.silu(z_), y_, y_.shape[-1:], mean, rstd, weight_, bias_, [True, True, True]
    )
    return (
        grad_y.to(y.dtype).contiguous(),
        grad_z.to(z.dtype).contiguous(),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )


def gated_layer_norm_gradients_(
    grad_z: Tensor,
    grad_output: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.gated_layer_norm_gradients_`."""
    gradients = gated_layer_norm_backward(grad_output, y, z, weight, bias, eps)
    grad_y, of_z, grad_weight, grad_bias = gradients
    grad_z.copy_(of_z)
    return grad_y, gated_layer_norm(y, z, weight, bias, eps), grad_weight, grad_bias
