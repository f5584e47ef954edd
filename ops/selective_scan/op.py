"""``spatial_mamba::selective_scan``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops._precision import accumulation_dtype, empty_output
from spatial_mamba_d2.ops.selective_scan import cuda, eager, reference

_NAME = "selective_scan"
_extension.define(
    _NAME,
    fake=lambda u, *_: empty_output(u, accumulation_dtype(u)),
    eager=eager.selective_scan,
    reference=reference.selective_scan,
    eager_backward=eager.selective_scan_backward,
    cuda=cuda.selective_scan,
    cuda_backward=cuda.selective_scan_backward,
    differentiable=eager.differentiable_selective_scan,
)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor) -> Tensor:
    """Hidden states of a diagonal selective state space model with one state per channel.

    ``h_t = exp(s_t A) h_{t-1} + s_t B_t u_t`` with ``h_{-1} = 0`` and the step size
    ``s = softplus(delta + delta_bias)`` (the identity above 20). Mamba (arXiv 2312.00752) eq. 2 as
    Spatial-Mamba (arXiv 2410.15091) eq. 3 uses it: no observation ``C``, no skip ``D``.

    Args:
        u: input, ``Tensor[B, L, D]``.
        delta: step sizes before bias and softplus, ``Tensor[B, L, D]``.
        A: state matrix, negative for a stable recursion, ``Tensor[D]``.
        B: input vector, shared by the channels, ``Tensor[B, L]``.
        delta_bias: ``Tensor[D]``.

    Returns:
        h, ``Tensor[B, L, D]``, contiguous; float64 for float64 ``u``, else float32.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_activation(_NAME, "u", u, "B L D")
    batch, length, dim = u.shape
    check_tensor(_NAME, "delta", delta, (batch, length, dim), "[B, L, D]")
    check_tensor(_NAME, "A", A, (dim,), "[D]")
    check_tensor(_NAME, "B", B, (batch, length), "[B, L]")
    check_tensor(_NAME, "delta_bias", delta_bias, (dim,), "[D]")
    return torch.ops.spatial_mamba.selective_scan(u, delta, A, B, delta_bias)
