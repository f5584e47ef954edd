"""``structure_aware_ssm_from_dt`` on CUDA devices: launches of the kernels in ``ssm.cuh``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import check_map, contiguous_as, in_dtypes_of
from spatial_mamba_d2.ops.structure_aware_ssm.cuda import kernel_sets, ssm, ssm_backward
from spatial_mamba_d2.ops.structure_aware_ssm_from_dt.eager import factor_gradients

FORWARD, BACKWARD = kernel_sets("LowRankSteps<{T}>", 4)


class LowRankSteps:
    """The product of ``Tensor[B, H, W, R]`` and ``Tensor[D, R]`` transposed."""

    def __init__(self, dt: Tensor, dt_weight: Tensor):
        self.dt, self.dt_weight, self.dtype = dt, dt_weight, dt.dtype

    def shapes(self, op: str, u: Tensor) -> list[tuple[str, Tensor, Sequence[int]]]:
        check_map(op, "dt", self.dt, channels="R")
        rank = self.dt.shape[3]
        return [
            ("dt", self.dt, (*u.shape[:3], rank)),
            ("dt_weight", self.dt_weight, (u.shape[3], rank)),
        ]

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, int]]:
        dt, weight, missing = self.dt, self.dt_weight, -self.dt.shape[3] % 4
        if missing:  # kernels load four values at once
            dt, weight = F.pad(dt, (0, missing)), F.pad(weight, (0, missing))
        (dt,) = contiguous_as(dtype, dt)
        if dt.data_ptr() % (4 * dt.itemsize):
            dt = dt.clone()
        (weight,) = contiguous_as(accumulation_dtype(dt), weight.T)
        return dt, (weight, dt.shape[3])


def structure_aware_ssm_from_dt(
    u: Tensor, dt: Tensor, dt_weight: Tensor, *others: Tensor
) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm_from_dt`."""
    steps = LowRankSteps(dt, dt_weight)
    return ssm("structure_aware_ssm_from_dt", FORWARD, u, steps, *others)


def structure_aware_ssm_from_dt_backward(
    grad_output: Tensor, u: Tensor, dt: Tensor, dt_weight: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of all inputs, in order."""
    op, steps = "structure_aware_ssm_from_dt_backward", LowRankSteps(dt, dt_weight)
    of_ssm = ssm_backward(op, BACKWARD, grad_output, u, steps, *others)
    grad_u, grad_delta, *grad_others = of_ssm
    gradients = (grad_u, *factor_gradients(grad_delta, dt, dt_weight), *grad_others)
    return in_dtypes_of((u, dt, dt_weight, *others), gradients)
