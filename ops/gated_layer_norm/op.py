"""``spatial_mamba::gated_layer_norm``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops._precision import empty_output
from spatial_mamba_d2.ops.gated_layer_norm import cuda, eager, reference

_NAME = "gated_layer_norm"
_extension.define(
    _NAME,
    fake=lambda y, *_: empty_output(y),
    eager=eager.gated_layer_norm,
    reference=reference.gated_layer_norm,
    eager_backward=eager.gated_layer_norm_backward,
    differentiable=eager.differentiable_gated_layer_norm,
    cuda=cuda.gated_layer_norm,
    cuda_backward=cuda.gated_layer_norm_backward,
)


def gated_layer_norm(
    y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """``LayerNorm(y) * SiLU(z)``: the gate after the state space model.

    ``StructureAwareSSM.forward`` of the authors' code (``out_norm(y) * act(z)``); figure 4 of
    Spatial-Mamba (arXiv 2410.15091).

    Args:
        y: ``Tensor[B, H, W, D]``, normalized over D.
        z: the gate, ``Tensor[B, H, W, D]``; the compiled kernels copy it unless its channels are
            dense and its tokens evenly spaced.
        weight, bias: of the norm, ``Tensor[D]``.
        eps: added to the variance.

    Returns:
        ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``y``; computed in float32 (float64 for
        float64 ``y``). The backward pass keeps nothing but the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if not torch.jit.is_scripting():
        check_activation(_NAME, "y", y, "B H W D")
        dim = y.shape[-1]
        check_tensor(_NAME, "z", z, tuple(y.shape), "[B, H, W, D]")
        check_tensor(_NAME, "weight", weight, (dim,), "[D]")
        check_tensor(_NAME, "bias", bias, (dim,), "[D]")
    return torch.ops.spatial_mamba.gated_layer_norm(y, z, weight, bias, eps)
