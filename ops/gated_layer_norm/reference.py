"""Norm and gate written out: the truth that every other kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise


def gated_layer_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.gated_layer_norm`."""
    y_, gate, weight, bias = precise(y, z, weight, bias)
    centred = y_ - y_.mean(-1, keepdim=True)
    normalized = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = (normalized * weight + bias) * gate * torch.sigmoid(gate)
    return out.to(y.dtype)


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
    y_, z_, grad, weight_, bias_ = precise(y, z, grad_output, weight, bias)
    centred = y_ - y_.mean(-1, keepdim=True)
    scale = 1 / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    normalized = centred * scale
    norm = normalized * weight_ + bias_
    sigmoid = torch.sigmoid(z_)
    grad_z.copy_(grad * norm * sigmoid * (1 + z_ * (1 - sigmoid)))
    grad_norm = grad * z_ * sigmoid
    grad_normalized = grad_norm * weight_
    shift = grad_normalized.mean(-1, keepdim=True)
    slope = (grad_normalized * normalized).mean(-1, keepdim=True)
    grad_y = scale * (grad_normalized - shift - normalized * slope)
    grad_weight = (grad_norm * normalized).sum(dim=(0, 1, 2))
    return (
        grad_y.to(y.dtype),
        (norm * z_ * sigmoid).to(y.dtype),
        grad_weight.to(weight.dtype),
        grad_norm.sum(dim=(0, 1, 2)).to(bias.dtype),
    )
