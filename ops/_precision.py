"""The precision in which operators accumulate, and the outputs that they allocate."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and sums: float64 for float64 ``x``, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def precise(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the accumulation dtype of the first; those that have it are not copied."""
    dtype = accumulation_dtype(tensors[0])
    return [x.to(dtype) for x in tensors]


def empty_output(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized contiguous memory of the shape of ``like``, in its dtype or the one given."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
