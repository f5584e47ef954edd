"""The matrix product by PyTorch, then the operator that takes step sizes as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import precise


def low_rank_structure_aware_ssm_(
    u: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    taps: Tensor,
) -> None:
    """See :func:`spatial_mamba_d2.ops.low_rank_structure_aware_ssm_`."""
    _, dt, dt_weight = precise(u, dt, dt_weight)
    delta = F.linear(dt, dt_weight)
    y = torch.ops.spatial_mamba.structure_aware_ssm(u, delta, A, B, C, D, delta_bias, taps)
    u.copy_(y)
