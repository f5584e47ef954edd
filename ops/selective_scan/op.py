"""``spatial_mamba::selective_scan``: schema, documentation, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.selective_scan import eager, reference

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor delta_bias"
_extension.define(f"selective_scan({_INPUTS}) -> Tensor")
_extension.define(
    f"selective_scan_backward(Tensor grad_h, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_extension.register_python(
    "selective_scan", eager=eager.selective_scan, reference=reference.selective_scan
)
_extension.register_python(
    "selective_scan_backward",
    eager=eager.selective_scan_backward,
    reference=_extension.gradients_of(reference.selective_scan),
)


@torch.library.register_fake("spatial_mamba::selective_scan", lib=_extension.LIBRARY)
def _(u, delta, A, B, delta_bias):
    return torch.empty_like(
        u,
        dtype=torch.promote_types(u.dtype, torch.float32),
        memory_format=torch.contiguous_format,
    )


@torch.library.register_fake("spatial_mamba::selective_scan_backward", lib=_extension.LIBRARY)
def _(grad_h, u, delta, A, B, delta_bias):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (u, delta, A, B, delta_bias)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_h):
    return torch.ops.spatial_mamba.selective_scan_backward(grad_h, *ctx.saved_tensors)


torch.library.register_autograd(
    "spatial_mamba::selective_scan",
    _backward,
    setup_context=_setup_context,
    lib=_extension.LIBRARY,
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
    check_activation("selective_scan", "u", u, "B L D")
    batch, length, dim = u.shape
    check_tensor("selective_scan", "delta", delta, (batch, length, dim), "[B, L, D]")
    check_tensor("selective_scan", "A", A, (dim,), "[D]")
    check_tensor("selective_scan", "B", B, (batch, length), "[B, L]")
    check_tensor("selective_scan", "delta_bias", delta_bias, (dim,), "[D]")
    return torch.ops.spatial_mamba.selective_scan(u, delta, A, B, delta_bias)
