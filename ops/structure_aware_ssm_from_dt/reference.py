"""The projection written out, then the SSM's equations: the truth for tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise
from spatial_mamba_d2.ops.structure_aware_ssm.reference import structure_aware_ssm


def structure_aware_ssm_from_dt(
    u: Tensor, dt: Tensor, dt_weight: Tensor, *others: Tensor
) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm_from_dt`.

    ``others`` are ``A, B, C, D, delta_bias, taps``.
    """
    _, dt, dt_weight = precise(u, dt, dt_weight)
    delta = torch.einsum("bhwr,dr->bhwd", dt, dt_weight)
    return structure_aware_ssm(u, delta, *others).to(u.dtype)


def structure_aware_ssm_from_dt_(u: Tensor, *others: Tensor) -> None:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm_from_dt_`."""
    u.copy_(structure_aware_ssm_from_dt(u, *others))
