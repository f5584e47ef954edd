"""``spatial_mamba::gated_layer_norm``: schema, documentation, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.gated_layer_norm import eager, reference

_NAME = "gated_layer_norm"
_INPUTS = "Tensor y, Tensor z, Tensor weight, Tensor bias, float eps"
_extension.define(f"{_NAME}({_INPUTS}) -> Tensor")
_extension.define(
    f"{_NAME}_backward(Tensor grad_output, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_extension.register_python(
    _NAME, eager=eager.gated_layer_norm, reference=reference.gated_layer_norm, by_design=("cuda",)
)
_extension.register_python(
    f"{_NAME}_backward",
    eager=eager.gated_layer_norm_backward,
    reference=_extension.gradients_of(reference.gated_layer_norm),
    by_design=("cuda",),
)


@torch.library.register_fake(f"spatial_mamba::{_NAME}", lib=_extension.LIBRARY)
def _(y, z, weight, bias, eps):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.register_fake(f"spatial_mamba::{_NAME}_backward", lib=_extension.LIBRARY)
def _(grad_output, y, z, weight, bias, eps):
    inputs = (y, z, weight, bias)
    return tuple(torch.empty_like(i, memory_format=torch.contiguous_format) for i in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_output):
    gradients = torch.ops.spatial_mamba.gated_layer_norm_backward(
        grad_output, *ctx.saved_tensors, ctx.eps
    )
    return *gradients, None


torch.library.register_autograd(
    f"spatial_mamba::{_NAME}", _backward, setup_context=_setup_context, lib=_extension.LIBRARY
)


def gated_layer_norm(
    y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """``LayerNorm(y) * SiLU(z)``: the gate behind the state space model.

    ``StructureAwareSSM.forward`` of the authors' code (``out_norm(y) * act(z)``); figure 4 of
    Spatial-Mamba (arXiv 2410.15091).

    Args:
        y: ``Tensor[B, H, W, D]``, normalised over D.
        z: the gate, ``Tensor[B, H, W, D]``; only ``D`` must be dense for the fast kernels.
        weight, bias: of the norm, ``Tensor[D]``.
        eps: added to the variance.

    Returns:
        ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``y``; computed in float32 (float64 for
        float64 ``y``). Backward keeps only the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_activation(_NAME, "y", y, "B H W D")
    dim = y.shape[-1]
    check_tensor(_NAME, "z", z, tuple(y.shape), "[B, H, W, D]")
    check_tensor(_NAME, "weight", weight, (dim,), "[D]")
    check_tensor(_NAME, "bias", bias, (dim,), "[D]")
    return torch.ops.spatial_mamba.gated_layer_norm(y, z, weight, bias, eps)
