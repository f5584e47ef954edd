"""``spatial_mamba::structure_aware_ssm`` on CUDA devices: launches the kernels in ``ssm.cuh``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    LANES,
    blocks_of,
    check_arguments,
    check_map,
    contiguous_as,
    in_dtypes_of,
)
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.selective_scan.cuda import Scan, Segments
from spatial_mamba_d2.ops.state_fusion.cuda import Tiles, cut, over_tiles
from spatial_mamba_d2.ops.state_fusion.taps import RADIUS, TAPS

# The loop over the tokens of ScanRows is unrolled 4 times, or less where registers are scarce.
FORWARD = KernelSet(
    "structure_aware_ssm/ssm.cuh",
    reduce="reduce<{T}, ForwardPass<{T}>>",
    carry="carry<{Acc}>",
    observe="fuse_tiles<{Acc}, ScanRows<{T}, 4>, Observe<{T}>>",
)
BACKWARD = KernelSet(
    "structure_aware_ssm/ssm.cuh",
    reduce="reduce<{T}, ForwardPass<{T}>>",
    reduce_adjoint="reduce<{T}, AdjointPass<{T}>>",
    carry="carry<{Acc}>",
    grad_observed="fuse_tiles<{Acc}, ScanRows<{T}, 2>, GradObserved<{T}>>",
    grad_input="grad_input_tiles<{Acc}, LoadGradient<{T}>, {Acc}>",
    apply_adjoint="apply_adjoint<{T}, true>",
)


def image_segments(tiles: Tiles) -> Segments:
    """The rows are those of the map; each tile has a segment, which begins at its left halo."""
    tokens = tiles.height * tiles.width
    rows = tiles.height
    return Segments(tokens, tiles.width, rows, tiles.tiles, tiles.tile_width, RADIUS)


def ssm_shapes(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, taps: Tensor
) -> list[tuple[str, Tensor, Sequence[int]]]:
    """All inputs except u and the step sizes, for :func:`check_arguments`."""
    tokens, dim = u.shape[:3], u.shape[3]
    return [
        ("A", A, (dim,)),
        ("B", B, tokens),
        ("C", C, tokens),
        ("D", D, (dim,)),
        ("delta_bias", delta_bias, (dim,)),
        ("taps", taps, (TAPS, dim)),
    ]


class _Call:
    """One call: its inputs, checked, in the dtype and layout that kernels take."""

    def __init__(self, op: str, kernel_set: KernelSet, *inputs: Tensor):
        u, delta, A, B, C, D, delta_bias, taps = inputs
        check_map(op, "u", u)
        others = ssm_shapes(u, A, B, C, D, delta_bias, taps)
        check_arguments(op, u, [("delta", delta, u.shape), *others])
        dtype = torch.promote_types(u.dtype, delta.dtype)
        self.kernels: Any = kernel_set.on(u.device, dtype)
        self.u, delta = contiguous_as(dtype, u, delta)
        small = contiguous_as(accumulation_dtype(self.u), A, B, C, D, delta_bias, taps)
        A, B, self.C, self.D, delta_bias, self.taps = small
        self.tiles = cut(tuple(u.shape), A.itemsize, self.kernels)
        self.scan = Scan(self.u, delta, A, B, delta_bias, image_segments(self.tiles))


def structure_aware_ssm(*inputs: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm`."""
    call = _Call("structure_aware_ssm", FORWARD, *inputs)
    y = torch.empty_like(call.u)
    if y.numel():
        call.scan.launch_carries(call.kernels)
        sink = (call.u, call.C, call.D, y)
        over_tiles(call.kernels.observe, call.tiles, call.taps, *call.scan.members, *sink)
    return in_dtypes_of(inputs[:1], [y])[0]


def structure_aware_ssm_backward(grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all inputs, in order."""
    op = "structure_aware_ssm_backward"
    call = _Call(op, BACKWARD, *inputs)
    u, scan, tiles, kernels = call.u, call.scan, call.tiles, call.kernels
    check_arguments(op, u, [("grad_output", grad_output, u.shape)])
    (grad_y,) = contiguous_as(u.dtype, grad_output)
    grad_h = u.new_empty(u.shape, dtype=scan.acc)
    grad_C = u.new_empty((blocks_of(tiles.dim, LANES), *u.shape[:3]), dtype=scan.acc)
    grad_taps = u.new_empty((tiles.parts, TAPS, tiles.dim), dtype=scan.acc)
    if scan.images:
        scan.launch_carries(kernels)
        sink = (grad_y, call.C, grad_C, grad_taps, grad_C[0].numel())
        over_tiles(kernels.grad_observed, tiles, call.taps, *scan.members, *sink)
        over_tiles(kernels.grad_input, tiles, call.taps, grad_y, call.C, grad_h)
    of_scan = scan.launch_backward(kernels, grad_h, grad_y, call.D)
    grad_u, grad_delta, grad_A, grad_B, grad_bias, grad_D = of_scan
    gradients = (grad_u, grad_delta, grad_A, grad_B, grad_C.sum(0), grad_D, grad_bias)
    return in_dtypes_of(inputs, (*gradients, grad_taps.sum(0)))
