"""The structure-aware SSM in plain PyTorch, from the eager scan and fusion.

Nothing but the inputs is kept for the backward pass, which recomputes the states.
"""

from __future__ import annotations

from torch import Tensor

from spatial_mamba_d2.ops._precision import precise
from spatial_mamba_d2.ops.selective_scan.eager import (
    differentiable_selective_scan,
    selective_scan,
    selective_scan_backward,
)
from spatial_mamba_d2.ops.state_fusion.eager import state_fusion, state_fusion_backward


def structure_aware_ssm(*inputs: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm`."""
    u, delta, A, B, C, D, delta_bias, taps = inputs
    h = selective_scan(u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1), delta_bias)
    y = state_fusion(h.view(u.shape), taps)
    y.mul_(C.to(y.dtype).unsqueeze(-1)).addcmul_(u.to(y.dtype), D.to(y.dtype))
    return y.to(u.dtype)


def differentiable_structure_aware_ssm(*inputs: Tensor) -> Tensor:
    """:func:`structure_aware_ssm` of operations that all derivatives pass through."""
    u, delta, A, B, C, D, delta_bias, taps = inputs
    sequence = (u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1), delta_bias)
    h = differentiable_selective_scan(*sequence)
    u_, C, D = precise(u, C, D)
    y = C.unsqueeze(-1) * state_fusion(h.view(u.shape), taps) + D * u_
    return y.to(u.dtype)


def structure_aware_ssm_backward(grad_y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all inputs, in order."""
    u, delta, A, B, C, D, delta_bias, taps = inputs
    sequence = (u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1), delta_bias)
    h = selective_scan(*sequence)
    states = h.view(u.shape)
    grad_y = grad_y.to(h.dtype)
    grad_C = (grad_y * state_fusion(states, taps)).sum(-1)
    grad_D = (grad_y * u).sum((0, 1, 2))
    grad_states, grad_taps = state_fusion_backward(
        grad_y * C.to(h.dtype).unsqueeze(-1), states, taps
    )
    grad_u, grad_delta, grad_A, grad_B, grad_bias = selective_scan_backward(
        grad_states.flatten(1, 2), *sequence, h=h
    )
    grad_u = (grad_u.view(u.shape) + grad_y * D.to(h.dtype)).to(u.dtype)
    return (
        grad_u,
        grad_delta.view(delta.shape),
        grad_A,
        grad_B.view(B.shape),
        grad_C.to(C.dtype),
        grad_D.to(D.dtype),
        grad_bias,
        grad_taps.to(taps.dtype),
    )
