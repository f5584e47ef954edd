"""``structure_aware_ssm_from_dt`` on CUDA devices: launches of the kernels in ``ssm.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import check_arguments, check_map, contiguous_as
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.selective_scan.cuda import Scan
from spatial_mamba_d2.ops.state_fusion.cuda import cut, over_tiles
from spatial_mamba_d2.ops.structure_aware_ssm.cuda import image_segments, ssm_shapes

_STEPS = "LowRankSteps<{T}>"
FORWARD = KernelSet(
    "structure_aware_ssm/ssm.cuh",
    reduce=f"reduce<{{T}}, ForwardPass<{{T}}, {_STEPS}>>",
    carry="carry<{Acc}>",
    observe=f"fuse_tiles<{{Acc}}, ScanRows<{{T}}, 3, {_STEPS}>, Observe<{{T}}>>",
)


def structure_aware_ssm_from_dt(*inputs: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm_from_dt`."""
    u, dt, dt_weight, A, B, C, D, delta_bias, taps = inputs
    op = "structure_aware_ssm_from_dt"
    check_map(op, "u", u)
    check_map(op, "dt", dt, channels="R")
    rank = dt.shape[3]
    steps = [("dt", dt, (*u.shape[:3], rank)), ("dt_weight", dt_weight, (u.shape[3], rank))]
    others = ssm_shapes(u, A, B, C, D, delta_bias, taps)
    check_arguments(op, u, [*steps, *others])
    u_dtype, dtype = u.dtype, torch.promote_types(u.dtype, dt.dtype)
    kernels = FORWARD.on(u.device, dtype)
    y = torch.empty(u.shape, dtype=dtype, device=u.device)
    if not y.numel():
        return y.to(u_dtype)
    missing = -rank % 4  # kernels load four values at once
    if missing:
        dt, dt_weight = F.pad(dt, (0, missing)), F.pad(dt_weight, (0, missing))
    u, dt = contiguous_as(dtype, u, dt)
    if dt.data_ptr() % (4 * dt.itemsize):
        dt = dt.clone()
    acc = accumulation_dtype(u)
    dt_weight, A, B, C, D, delta_bias, taps = contiguous_as(
        acc, dt_weight.T, A, B, C, D, delta_bias, taps
    )
    tiles = cut(tuple(u.shape), acc.itemsize, kernels)
    low_rank = (dt_weight, rank + missing)
    scan = Scan(u, dt, A, B, delta_bias, image_segments(tiles), low_rank)
    scan.launch_carries(kernels)
    over_tiles(kernels.observe, tiles, taps, *scan.members, u, C, D, y)
    return y.to(u_dtype)
