"""The structure-aware SSM as its equations: scan, fusion, observation."""

from __future__ import annotations

from torch import Tensor

from spatial_mamba_d2.ops._precision import precise
from spatial_mamba_d2.ops.selective_scan.reference import selective_scan
from spatial_mamba_d2.ops.state_fusion.reference import state_fusion


def structure_aware_ssm(*inputs: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm`."""
    u, delta, A, B, C, D, delta_bias, taps = inputs
    h = selective_scan(u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1), delta_bias)
    fused = state_fusion(h.view(u.shape), taps)
    u_, C, D = precise(u, C, D)
    y = C.unsqueeze(-1) * fused + D * u_
    return y.to(u.dtype)
