"""GELU and its slope written out: the truth that other kernels are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise


def gelu_gradients(grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.gelu_gradients`."""
    x_, grad = precise(x, grad_output)
    probability = torch.special.ndtr(x_)  # that a standard normal variable is below x
    density = torch.exp(-x_.square() / 2) / math.sqrt(2 * math.pi)
    grad_x = grad * (probability + x_ * density)
    return grad_x.to(x.dtype), (x_ * probability).to(x.dtype), grad_x.sum(dim=(0, 1, 2))
