"""The peak that backbones are measured against: the rate of large matrix products, GEMMs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from spatial_mamba_d2.models.packed import PackedLinear
from spatial_mamba_d2.profiling.candidates import Candidates, is_float32

GEMM_SIDE = 2048  # rows and columns of all three matrices


def matrix_products() -> Candidates:
    """Products in both precisions, by PyTorch and, where oneDNN can, with packed weights."""
    candidates: Candidates = {}
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, ", bfloat16")):
        x, weight = torch.randn(2, GEMM_SIDE, GEMM_SIDE).to(dtype)
        packed = PackedLinear(weight)
        candidates[f"GEMM {GEMM_SIDE}^3, PyTorch's linear{suffix}"] = partial(F.linear, x, weight)
        if packed.packed:
            candidates[f"GEMM {GEMM_SIDE}^3, packed for oneDNN{suffix}"] = partial(packed, x)
    return candidates


def fraction_of_peak(seconds: dict[str, float], gflop: float) -> dict[str, Any]:
    """The rate of each matrix product, and what each of our backbones reaches of the best one.

    That is the best one in float32, or in bfloat16 for a backbone in bfloat16.

    Args:
        seconds: of all candidates.
        gflop: work of one call of our backbone, at 2 FLOPs per multiply-add.
    """
    peak_gflops = {
        name: 2 * GEMM_SIDE**3 / 1e9 / value for name, value in seconds.items() if "GEMM" in name
    }
    best = {
        is_exact: max(rate for name, rate in peak_gflops.items() if is_float32(name) == is_exact)
        for is_exact in (True, False)
    }
    fraction = {
        name: gflop / value / best[is_float32(name)]
        for name, value in seconds.items()
        if name.startswith("ours") and "TF32" not in name
    }
    return {"peak_gflops": peak_gflops, "peak_fraction": fraction}
