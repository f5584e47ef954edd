"""The sums written out: the truth that other kernels are tested against."""

from __future__ import annotations

from torch import Tensor

from spatial_mamba_d2.ops._precision import precise


def add_bias_(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> None:
    """See :func:`spatial_mamba_d2.ops.add_bias_`."""
    x_, bias = precise(x, bias)
    y = x_ + bias
    if residual is not None:
        y = y + residual
    x.copy_(y.clamp(min=0) if relu else y)
