"""The projection of the step sizes by PyTorch, then the operator that takes them as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import precise, precise_inside
from spatial_mamba_d2.ops.structure_aware_ssm.eager import differentiable_structure_aware_ssm


def structure_aware_ssm_from_dt(
    u: Tensor, dt: Tensor, dt_weight: Tensor, *others: Tensor
) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm_from_dt`.

    ``others`` are ``A, B, C, D, delta_bias, taps``.
    """
    delta = _delta(u, dt, dt_weight)
    return torch.ops.spatial_mamba.structure_aware_ssm(u, delta, *others).to(u.dtype)


def _delta(u: Tensor, dt: Tensor, dt_weight: Tensor) -> Tensor:
    _, dt, dt_weight = precise_inside(u, dt, dt_weight)
    return F.linear(dt, dt_weight)


def differentiable_structure_aware_ssm_from_dt(
    u: Tensor, dt: Tensor, dt_weight: Tensor, *others: Tensor
) -> Tensor:
    """:func:`structure_aware_ssm_from_dt` of operations that all derivatives pass through."""
    _, dt, dt_weight = precise(u, dt, dt_weight)
    return differentiable_structure_aware_ssm(u, F.linear(dt, dt_weight), *others)


def structure_aware_ssm_from_dt_backward(
    grad_output: Tensor, u: Tensor, dt: Tensor, dt_weight: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of all inputs, in order."""
    of_ssm = torch.ops.spatial_mamba.structure_aware_ssm_backward(
        grad_output, u, _delta(u, dt, dt_weight), *others
    )
    grad_u, grad_delta, *grad_others = of_ssm
    grad_dt, grad_dt_weight = factor_gradients(grad_delta, dt, dt_weight)
    return grad_u, grad_dt.to(dt.dtype), grad_dt_weight.to(dt_weight.dtype), *grad_others


def factor_gradients(grad_delta: Tensor, dt: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``dt`` and ``dt_weight`` from that of their product, and in its dtype.

    Autograd computes the same, in the same precision, behind a linear layer.
    """
    rows = grad_delta.flatten(0, 2)
    of_dt = rows @ dt_weight.to(rows.dtype)
    of_weight = rows.T @ dt.to(rows.dtype).flatten(0, 2)
    return of_dt.view(dt.shape), of_weight


def structure_aware_ssm_from_dt_(u: Tensor, *others: Tensor) -> None:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm_from_dt_`."""
    u.copy_(torch.ops.spatial_mamba.structure_aware_ssm_from_dt(u, *others))
