"""The structure-aware SSM as its equations: scan, fusion, observation."""

from __future__ import annotations

from torch import Tensor

from spatial_mamba_d2.ops.selective_scan.reference import selective_scan
from spatial_mamba_d2.ops.state_fusion.reference import state_fusion


def structure_aware_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    taps: Tensor,
) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm`."""
    h = selective_scan(u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1), delta_bias)
    fused = state_fusion(h.view(u.shape), taps)
    y = C.to(h.dtype).unsqueeze(-1) * fused + D.to(h.dtype) * u.to(h.dtype)
    return y.to(u.dtype)
