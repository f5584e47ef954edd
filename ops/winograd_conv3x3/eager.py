"""Winograd's formula for as many tiles at a time as fit into bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise
from spatial_mamba_d2.ops.winograd_conv3x3.factors import (
    PATCH,
    assembled,
    patches,
    tile_outputs,
    to_factors,
    unpacked,
)

MAX_BYTES = 2**26  # of the factors and products that are held at once


def winograd_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.winograd_conv3x3`."""
    x_, weight, bias_ = precise(x, weight, bias)
    matrices = unpacked(weight, len(bias))
    tile_bytes = PATCH**2 * sum(matrices.shape[1:]) * x_.element_size()
    parts = patches(x_).split(max(1, MAX_BYTES // tile_bytes), dim=2)
    outputs = [tile_outputs(to_factors(part) @ matrices) for part in parts]
    y = assembled(torch.cat(outputs, dim=2), (x.shape[0], x.shape[1], x.shape[2])).add_(bias_)
    return (y.relu_() if relu else y).to(x.dtype)
