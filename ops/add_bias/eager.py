"""The sums by PyTorch's own operators, in place."""

from __future__ import annotations

from torch import Tensor


def add_bias_(x: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> None:
    """See :func:`spatial_mamba_d2.ops.add_bias_`."""
    x.add_(bias)
    if residual is not None:
        x.add_(residual)
    if relu:
        x.relu_()
