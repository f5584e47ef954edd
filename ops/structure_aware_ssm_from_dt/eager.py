"""The projection of the step sizes by PyTorch, then the operator that takes them as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import precise_inside


def structure_aware_ssm_from_dt(
    u: Tensor, dt: Tensor, dt_weight: Tensor, *others: Tensor
) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm_from_dt`.

    ``others`` are ``A, B, C, D, delta_bias, taps``.
    """
    _, dt, dt_weight = precise_inside(u, dt, dt_weight)
    delta = F.linear(dt, dt_weight)
    return torch.ops.spatial_mamba.structure_aware_ssm(u, delta, *others).to(u.dtype)


def structure_aware_ssm_from_dt_(u: Tensor, *others: Tensor) -> None:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm_from_dt_`."""
    u.copy_(torch.ops.spatial_mamba.structure_aware_ssm_from_dt(u, *others))
