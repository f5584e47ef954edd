"""``spatial_mamba::structure_aware_ssm`` on CUDA devices: launches the kernels in ``ssm.cuh``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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


def kernel_sets(steps: str, unrolled_backward: int) -> tuple[KernelSet, KernelSet]:
    """Kernels, forward and backward, that take the step sizes of a type in ``steps.cuh``.

    The loop over the tokens of ScanRows is unrolled 4 times, or less where registers are scarce.
    """
    source = "structure_aware_ssm/ssm.cuh"
    reduce, carry = f"reduce<{{T}}, ForwardPass<{{T}}, {steps}>>", "carry<{Acc}>"
    rows = f"ScanRows<{{T}}, 4, {steps}>"
    rows_backward = f"ScanRows<{{T}}, {unrolled_backward}, {steps}>"
    forward = KernelSet(
        source, reduce=reduce, carry=carry, observe=f"fuse_tiles<{{Acc}}, {rows}, Observe<{{T}}>>"
    )
    backward = KernelSet(
        source,
        reduce=reduce,
        reduce_adjoint=f"reduce<{{T}}, AdjointPass<{{T}}, {steps}>>",
        carry=carry,
        grad_observed=f"fuse_tiles<{{Acc}}, {rows_backward}, GradObserved<{{T}}>>",
        grad_input="grad_input_tiles<{Acc}, LoadGradient<{T}>, {Acc}>",
        apply_adjoint=f"apply_adjoint<{{T}}, true, {steps}>",
    )
    return forward, backward


FORWARD, BACKWARD = kernel_sets("StoredSteps<{T}>", 2)


def image_segments(tiles: Tiles) -> Segments:
    """The rows are those of the map; each tile has a segment, which begins at its left halo."""
    tokens = tiles.height * tiles.width
    rows = tiles.height
    return Segments(tokens, tiles.width, rows, tiles.tiles, tiles.tile_width, RADIUS)


class Steps(Protocol):
    """Step sizes of a call."""

    dtype: torch.dtype

    def shapes(self, op: str, u: Tensor) -> list[tuple[str, Tensor, Sequence[int]]]:
        """For :func:`check_arguments`."""

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, int] | tuple[()]]:
        """``delta`` and ``low_rank`` of :class:`Scan`, of activations in ``dtype``."""


class StoredSteps:
    """A tensor of them, ``Tensor[B, H, W, D]``."""

    def __init__(self, delta: Tensor):
        self.delta, self.dtype = delta, delta.dtype

    def shapes(self, op: str, u: Tensor) -> list[tuple[str, Tensor, Sequence[int]]]:
        return [("delta", self.delta, u.shape)]

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, tuple[()]]:
        return contiguous_as(dtype, self.delta)[0], ()


class _Call:
    """One call: its inputs, checked, in the dtype and layout that kernels take."""

    def __init__(self, op: str, kernel_set: KernelSet, u: Tensor, steps: Steps, *others: Tensor):
        check_map(op, "u", u)
        tokens, dim = u.shape[:3], u.shape[3]
        shapes = (dim,), tokens, tokens, (dim,), (dim,), (TAPS, dim)
        named = zip(("A", "B", "C", "D", "delta_bias", "taps"), others, shapes, strict=True)
        check_arguments(op, u, [*steps.shapes(op, u), *named])
        dtype = torch.promote_types(u.dtype, steps.dtype)
        self.kernels: Any = kernel_set.on(u.device, dtype)
        (self.u,) = contiguous_as(dtype, u)
        delta, low_rank = steps.operands(dtype)
        small = contiguous_as(accumulation_dtype(self.u), *others)
        A, B, self.C, self.D, delta_bias, self.taps = small
        self.tiles = cut(tuple(u.shape), A.itemsize, self.kernels)
        segments = image_segments(self.tiles)
        self.scan = Scan(self.u, delta, A, B, delta_bias, segments, low_rank)


def ssm(op: str, kernel_set: KernelSet, u: Tensor, steps: Steps, *others: Tensor) -> Tensor:
    """The output, in the dtype of ``u``. ``others`` are ``A, B, C, D, delta_bias, taps``."""
    call = _Call(op, kernel_set, u, steps, *others)
    y = torch.empty_like(call.u)
    if y.numel():
        call.scan.launch_carries(call.kernels)
        sink = (call.u, call.C, call.D, y)
        over_tiles(call.kernels.observe, call.tiles, call.taps, *call.scan.members, *sink)
    return in_dtypes_of([u], [y])[0]


def ssm_backward(
    op: str, kernel_set: KernelSet, grad_output: Tensor, u: Tensor, steps: Steps, *others: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of ``u``, delta and ``others``, in the dtypes in which kernels write them."""
    call = _Call(op, kernel_set, u, steps, *others)
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
    return *gradients, grad_taps.sum(0)


def structure_aware_ssm(u: Tensor, delta: Tensor, *others: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.structure_aware_ssm`."""
    return ssm("structure_aware_ssm", FORWARD, u, StoredSteps(delta), *others)


def structure_aware_ssm_backward(
    grad_output: Tensor, u: Tensor, delta: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of all inputs, in order."""
    op, steps = "structure_aware_ssm_backward", StoredSteps(delta)
    gradients = ssm_backward(op, BACKWARD, grad_output, u, steps, *others)
    return in_dtypes_of((u, delta, *others), gradients)
