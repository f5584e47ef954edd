"""``spatial_mamba::structure_aware_ssm``: schema, documentation, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.state_fusion.taps import TAPS
from spatial_mamba_d2.ops.structure_aware_ssm import eager, reference

_NAME = "structure_aware_ssm"
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, Tensor taps"
)
_extension.define(f"{_NAME}({_INPUTS}) -> Tensor")
_extension.define(
    f"{_NAME}_backward(Tensor grad_y, {_INPUTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_extension.register_python(
    _NAME, eager=eager.structure_aware_ssm, reference=reference.structure_aware_ssm
)
_extension.register_python(
    f"{_NAME}_backward",
    eager=eager.structure_aware_ssm_backward,
    reference=_extension.gradients_of(reference.structure_aware_ssm),
)


@torch.library.register_fake(f"spatial_mamba::{_NAME}", lib=_extension.LIBRARY)
def _(u, *args):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.register_fake(f"spatial_mamba::{_NAME}_backward", lib=_extension.LIBRARY)
def _(grad_y, *inputs):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y):
    return torch.ops.spatial_mamba.structure_aware_ssm_backward(grad_y, *ctx.saved_tensors)


torch.library.register_autograd(
    f"spatial_mamba::{_NAME}", _backward, setup_context=_setup_context, lib=_extension.LIBRARY
)


def check_inputs(
    op: str,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    taps: Tensor,
) -> None:
    """Raise ``ValueError`` unless all of them but the step sizes fit ``u``, ``[B, H, W, D]``."""
    *tokens, dim = u.shape
    for name, x in (("B", B), ("C", C)):
        check_tensor(op, name, x, tuple(tokens), "[B, H, W]")
    for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias)):
        check_tensor(op, name, x, (dim,), "[D]")
    check_tensor(op, "taps", taps, (TAPS, dim), "[25, D]")


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
    """The structure-aware state space model: scan in raster order, fuse the states, observe.

    ``h = selective_scan(u, delta, A, B, delta_bias)`` over the tokens row by row,
    ``h' = state_fusion(h, taps)``, ``y = C h' + D u``. Spatial-Mamba (arXiv 2410.15091) eqs. 3-5;
    in the authors' code ``StructureAwareSSM.forward_core``.

    Args:
        u: input, ``Tensor[B, H, W, D]``.
        delta: step sizes before bias and softplus, ``Tensor[B, H, W, D]``.
        A: state matrix, negative for a stable recursion, ``Tensor[D]``.
        B: input vector, ``Tensor[B, H, W]``.
        C: observation vector, ``Tensor[B, H, W]``.
        D: skip connection, ``Tensor[D]``.
        delta_bias: ``Tensor[D]``.
        taps: fusion weights, ``Tensor[25, D]``, from :func:`merge_taps`.

    Returns:
        y, ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``u``. States, softplus and sums are
        float32 (float64 for float64 ``u``) whatever the dtype of the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_activation(_NAME, "u", u, "B H W D")
    check_tensor(_NAME, "delta", delta, tuple(u.shape), "[B, H, W, D]")
    check_inputs(_NAME, u, A, B, C, D, delta_bias, taps)
    return torch.ops.spatial_mamba.structure_aware_ssm(u, delta, A, B, C, D, delta_bias, taps)
