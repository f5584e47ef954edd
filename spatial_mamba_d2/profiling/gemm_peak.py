"""The peak that backbones are measured against: the rate of large matrix products, GEMMs."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from spatial_mamba_d2.models.packed import PackedLinear
from spatial_mamba_d2.profiling.candidates import Candidates, is_float32

GEMM_SIDE = 2048  # rows and columns of all three matrices


def matrix_products() -> Candidates:
    """Products in float32, by PyTorch and with packed weights where oneDNN can pack them."""
    x, weight = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
    packed = PackedLinear(weight)
    name = f"GEMM {GEMM_SIDE}^3"
    candidates: Candidates = {f"{name}, PyTorch's linear": lambda: F.linear(x, weight)}
    if packed.packed:
        candidates[f"{name}, packed for oneDNN"] = lambda: packed(x)
    return candidates


def fraction_of_peak(seconds: dict[str, float], gflop: float) -> dict[str, Any]:
    """The rate of each matrix product, and what of the best one each of our backbones reaches.

    Args:
        seconds: of all candidates.
        gflop: work of one call of our backbone, at 2 FLOPs per multiply-add.
    """
    peak_gflops = {
        name: 2 * GEMM_SIDE**3 / 1e9 / value for name, value in seconds.items() if "GEMM" in name
    }
    best = max(peak_gflops.values())
    fraction = {
        name: gflop / value / best
        for name, value in seconds.items()
        if name.startswith("ours") and is_float32(name)
    }
    return {"peak_gflops": peak_gflops, "peak_fraction": fraction}
