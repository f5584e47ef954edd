"""Norm and gate written out: what every other kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_layer_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.gated_layer_norm`."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    x, gate = y.to(dtype), z.to(dtype)
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = (normalised * weight.to(dtype) + bias.to(dtype)) * gate * torch.sigmoid(gate)
    return out.to(y.dtype)
