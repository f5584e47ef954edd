"""Quantisation as its formula."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.quantize_uint8`."""
    if not x.isfinite().all():
        raise RuntimeError("quantize_uint8: x must be finite")
    steps = torch.round(x.double() / scale) + zero_point
    return steps.clamp(0, 255).to(torch.uint8)
