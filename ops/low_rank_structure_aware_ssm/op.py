"""``spatial_mamba::low_rank_structure_aware_ssm``: schema and documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.low_rank_structure_aware_ssm import eager, reference
from spatial_mamba_d2.ops.structure_aware_ssm.op import check_inputs

_NAME = "low_rank_structure_aware_ssm_"
_extension.define(
    f"{_NAME}(Tensor(a!) u, Tensor dt, Tensor dt_weight, Tensor A, Tensor B, Tensor C, Tensor D, "
    "Tensor delta_bias, Tensor taps) -> ()"
)
_extension.register_python(
    _NAME,
    eager=eager.low_rank_structure_aware_ssm_,
    reference=reference.low_rank_structure_aware_ssm_,
    by_design=("cuda",),
)


@torch.library.register_fake(f"spatial_mamba::{_NAME}", lib=_extension.LIBRARY)
def _(*args):
    return None


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
) -> Tensor:
    """:func:`structure_aware_ssm` with ``delta = dt dt_weight^T``, in place; for inference only.

    The step sizes, of few terms each, are computed where they are needed and never stored; the
    output takes the place of ``u``, which the cache still holds. In the authors' code ``dt_projs``
    and ``StructureAwareSSM.forward_core``.

    Args:
        u: input, ``Tensor[B, H, W, D]``; afterwards the output. Where it is contiguous, no other
            map of its size is needed.
        dt: step sizes before their projection, ``Tensor[B, H, W, R]`` with R >= 1.
        dt_weight: their projection, ``Tensor[D, R]``.
        A, B, C, D, delta_bias, taps: as of :func:`structure_aware_ssm`.

    Returns:
        ``u``. Step sizes, states, softplus and sums are float32 (float64 for float64 ``u``)
        whatever the dtype of the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: gradients are on and an input wants one.
    """
    tensors = (u, dt, dt_weight, A, B, C, D, delta_bias, taps)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{_NAME} is for inference and has no gradients; torch.nn.functional.linear and "
            "structure_aware_ssm have"
        )
    check_activation(_NAME, "u", u, "B H W D")
    batch, height, width, dim = u.shape
    check_activation(_NAME, "dt", dt, "B H W R")
    rank = dt.shape[-1]
    check_tensor(_NAME, "dt", dt, (batch, height, width, rank), "[B, H, W, R]")
    check_tensor(_NAME, "dt_weight", dt_weight, (dim, rank), "[D, R]")
    check_inputs(_NAME, u, A, B, C, D, delta_bias, taps)
    torch.ops.spatial_mamba.low_rank_structure_aware_ssm_(*tensors)
    return u
