"""The precision in which operators accumulate, whatever they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, or in float64 if the first is; the same ones where they are so."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(dtype) for x in tensors]
