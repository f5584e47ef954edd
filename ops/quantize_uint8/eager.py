"""Quantisation in few passes."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._checks import check_finite
from spatial_mamba_d2.ops._precision import precise


def quantize_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.quantize_uint8`."""
    (values,) = precise(x)
    check_finite("quantize_uint8", "x", values)
    steps = (values * (1 / scale)).round_().add_(zero_point).clamp_(0, 255)
    return steps.to(torch.uint8)
