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
