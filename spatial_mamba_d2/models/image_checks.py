"""What a model requires of its images."""

from __future__ import annotations

import torch
from torch import Tensor


def check_images(x: Tensor, in_chans: int, dtype: torch.dtype | None) -> None:
    """Raise ``ValueError`` unless ``x`` is ``Tensor[B, in_chans, H, W]`` in ``dtype``, if known.

    Autocast converts floating point types except float64, so that they are right as well.
    """
    if torch.jit.is_scripting():
        return
    if x.dim() != 4 or x.shape[1] != in_chans or 0 in x.shape[2:]:
        raise ValueError(f"x must be [B, {in_chans}, H, W] with H, W >= 1, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, normalised as in training, got {x.dtype}")
    if dtype not in (None, x.dtype):
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not autocast or torch.float64 in (x.dtype, dtype):
            raise ValueError(f"x must be in the model's dtype {dtype}, got {x.dtype}")
