"""``spatial_mamba::quantize_uint8``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_tensor
from spatial_mamba_d2.ops.quantize_uint8 import eager, reference

_NAME = "quantize_uint8"

_extension.define(
    _NAME,
    fake=lambda x, *_: x.new_empty(x.shape, dtype=torch.uint8),
    eager=eager.quantize_uint8,
    reference=reference.quantize_uint8,
    by_design=("cuda",),  # 8-bit products are for CPUs
)


def quantize_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """``round(x / scale) + zero_point``, limited to 0 to 255.

    Affine quantisation as in PyTorch and ONNX (``QuantizeLinear``), halves to even.

    Args:
        x: ``Tensor[..., D]``; the compiled kernels copy it unless it is contiguous.
        scale: size of a step, above 0.
        zero_point: what 0 becomes, from 0 to 255.

    Returns:
        ``uint8 Tensor[..., D]``, contiguous. ``x * (1 / scale)`` is computed in float32 (float64
        for float64 ``x``), so that values within rounding errors of half a step may become either
        of two. Integers have no gradients.

    Raises:
        ValueError: ``x`` is not floating point, or a number is out of range.
        RuntimeError: ``x`` contains NaN or infinities, which no integer stands for.
    """
    check_tensor(_NAME, "x", x, tuple(x.shape), "[..., D]")
    if not scale > 0:
        raise ValueError(f"{_NAME}: scale must be above 0, got {scale}")
    if not 0 <= zero_point <= 255:
        raise ValueError(f"{_NAME}: zero_point must be from 0 to 255, got {zero_point}")
    return torch.ops.spatial_mamba.quantize_uint8(x, scale, zero_point)
