"""``spatial_mamba::structure_aware_ssm``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops._precision import empty_output
from spatial_mamba_d2.ops.state_fusion.taps import TAPS
from spatial_mamba_d2.ops.structure_aware_ssm import cuda, eager, reference

_NAME = "structure_aware_ssm"
_extension.define(
    _NAME,
    fake=lambda u, *_: empty_output(u),
    eager=eager.structure_aware_ssm,
    reference=reference.structure_aware_ssm,
    eager_backward=eager.structure_aware_ssm_backward,
    cuda=cuda.structure_aware_ssm,
    cuda_backward=cuda.structure_aware_ssm_backward,
    differentiable=eager.differentiable_structure_aware_ssm,
)


def check_ssm(op: str, u: Tensor, *others: Tensor) -> None:
    """Raise ``ValueError`` unless ``others`` fit ``u``, ``Tensor[B, H, W, D]``.

    They are ``A, B, C, D, delta_bias, taps``: all inputs of the SSM except the step sizes.
    """
    *tokens, dim = u.shape
    channels, map_ = ((dim,), "[D]"), (tuple(tokens), "[B, H, W]")
    expected = {
        "A": channels,
        "B": map_,
        "C": map_,
        "D": channels,
        "delta_bias": channels,
        "taps": ((TAPS, dim), "[25, D]"),
    }
    for (name, (shape, like)), x in zip(expected.items(), others, strict=True):
        check_tensor(op, name, x, shape, like)


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
    if not torch.jit.is_scripting():
        check_activation(_NAME, "u", u, "B H W D")
        check_tensor(_NAME, "delta", delta, tuple(u.shape), "[B, H, W, D]")
        check_ssm(_NAME, u, A, B, C, D, delta_bias, taps)
    return torch.ops.spatial_mamba.structure_aware_ssm(u, delta, A, B, C, D, delta_bias, taps)
