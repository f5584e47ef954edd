"""``spatial_mamba::structure_aware_ssm_from_dt``, also in place: definition, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops._precision import empty_output
from spatial_mamba_d2.ops.structure_aware_ssm.op import check_ssm
from spatial_mamba_d2.ops.structure_aware_ssm_from_dt import cuda, eager, reference

_NAME = "structure_aware_ssm_from_dt"
_IN_PLACE = f"{_NAME}_"
_extension.define(
    _NAME,
    fake=lambda u, *_: empty_output(u),
    eager=eager.structure_aware_ssm_from_dt,
    reference=reference.structure_aware_ssm_from_dt,
    eager_backward=eager.structure_aware_ssm_from_dt_backward,
    cuda=cuda.structure_aware_ssm_from_dt,
    cuda_backward=_extension.without_autocast(cuda.structure_aware_ssm_from_dt_backward),
    differentiable=eager.differentiable_structure_aware_ssm_from_dt,
    by_design=("cpu",),  # the operators in place and without the product have kernels there
)
_extension.define(
    _IN_PLACE,
    fake=lambda *_: None,
    eager=eager.structure_aware_ssm_from_dt_,
    reference=reference.structure_aware_ssm_from_dt_,
    by_design=("cuda",),  # the other operator has a kernel there
)
_extension.forbid_gradients(_IN_PLACE, _NAME)


def _check(op: str, u: Tensor, dt: Tensor, dt_weight: Tensor, *others: Tensor) -> None:
    check_activation(op, "u", u, "B H W D")
    batch, height, width, dim = u.shape
    check_activation(op, "dt", dt, "B H W R")
    rank = dt.shape[-1]
    check_tensor(op, "dt", dt, (batch, height, width, rank), "[B, H, W, R]")
    check_tensor(op, "dt_weight", dt_weight, (dim, rank), "[D, R]")
    check_ssm(op, u, *others)


def structure_aware_ssm_from_dt(
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
    """:func:`structure_aware_ssm` with ``delta = dt dt_weight^T``, for inference and training.

    The step sizes are products of low rank R. CUDA kernels compute them where they are needed, also
    in the backward pass, and never store them; on other devices, they are computed once, as by a
    linear layer. In the authors' code ``dt_projs`` and ``StructureAwareSSM.forward_core``.

    Args:
        u: input, ``Tensor[B, H, W, D]``.
        dt: step sizes before their projection, ``Tensor[B, H, W, R]`` with R >= 1.
        dt_weight: their projection, ``Tensor[D, R]``.
        A, B, C, D, delta_bias, taps: see :func:`structure_aware_ssm`.

    Returns:
        ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``u``. Step sizes, states, softplus and
        sums are float32 (float64 for float64 ``u``) whatever the dtype of the inputs. On CUDA
        devices, the gradients of ``dt`` and ``dt_weight`` are products in the wider dtype of ``u``
        and ``dt``, as behind a linear layer.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check(_NAME, u, dt, dt_weight, A, B, C, D, delta_bias, taps)
    return torch.ops.spatial_mamba.structure_aware_ssm_from_dt(
        u, dt, dt_weight, A, B, C, D, delta_bias, taps
    )


def structure_aware_ssm_from_dt_(
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
    """:func:`structure_aware_ssm_from_dt`, in place; for inference, on CPUs.

    Its kernels for CPUs compute step sizes where they are needed and never store them; the output
    overwrites ``u``, which is still in cache. CUDA devices have kernels of the other operator only,
    because their threads read what others would overwrite.

    Args:
        u: input, ``Tensor[B, H, W, D]``; afterwards the output. If it is contiguous, no other map
            of its size is allocated.
        dt, dt_weight, A, B, C, D, delta_bias, taps: see :func:`structure_aware_ssm_from_dt`.

    Returns:
        ``u``. Step sizes, states, softplus and sums are float32 (float64 for float64 ``u``)
        whatever the dtype of the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: gradients are enabled and an input requires them.
    """
    _check(_IN_PLACE, u, dt, dt_weight, A, B, C, D, delta_bias, taps)
    torch.ops.spatial_mamba.structure_aware_ssm_from_dt_(
        u, dt, dt_weight, A, B, C, D, delta_bias, taps
    )
    return u
