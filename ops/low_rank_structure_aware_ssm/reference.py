"""The product written out, then the SSM's equations: what other kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops.structure_aware_ssm import reference as ssm_reference


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
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = torch.einsum("bhwr,dr->bhwd", dt.to(dtype), dt_weight.to(dtype))
    u.copy_(ssm_reference.structure_aware_ssm(u, delta, A, B, C, D, delta_bias, taps))
