"""Quantisation as its formula."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._checks import check_finite


def quantize_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.quantize_uint8`."""
    check_finite("quantize_uint8", "x", x)
    steps = torch.round(x.double() / scale) + zero_point
    return steps.clamp(0, 255).to(torch.uint8)
