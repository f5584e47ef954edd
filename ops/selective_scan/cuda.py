"""``spatial_mamba::selective_scan`` on CUDA devices: launches of the kernels in ``scan.cuh``."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    LANES,
    MAX_SIDE,
    Launch,
    blocks_of,
    check_arguments,
    contiguous_as,
    in_dtypes_of,
)
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.cuda.source import constants

FORWARD = KernelSet(
    "selective_scan/scan.cuh",
    reduce="reduce<{T}, ForwardPass<{T}>>",
    carry="carry<{Acc}>",
    apply="apply<{T}>",
)
BACKWARD = KernelSet(
    "selective_scan/scan.cuh",
    reduce="reduce<{T}, ForwardPass<{T}>>",
    reduce_adjoint="reduce<{T}, AdjointPass<{T}>>",
    carry="carry<{Acc}>",
    apply_adjoint="apply_adjoint<{T}, false>",
)


class Segments(NamedTuple):
    """How a sequence is cut: ``Segments`` of ``cuda.h``, in the same order."""

    tokens: int
    width: int
    rows: int
    per_row: int
    step: int
    shift: int


@cache
def constant(name: str) -> int:
    """Of the scan's sources."""
    return {**constants("selective_scan/cuda.h"), **constants("selective_scan/scan.cuh")}[name]


def sequence_segments(length: int) -> Segments:
    """Segments of a sequence that is not an image."""
    longest = constant("kMaxSegment")
    width = min(length, 16 * longest)
    return Segments(length, width, blocks_of(length, width), blocks_of(width, longest), longest, 0)


class Scan:
    """The scan in a call: its inputs, as kernels take them, and its launches.

    Args:
        u, delta: ``Tensor[images, ..., dim]`` of any number of axes, contiguous, of one dtype.
        A, B, bias: contiguous, in the accumulation dtype.
        segments: of each image.
        low_rank: if delta is a product: its second factor, ``Tensor[rank, dim]``, as A, and the
            rank, a multiple of 4; ``delta`` is then the first one, ``Tensor[images, ..., rank]``.
    """

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor,
        segments: Segments,
        low_rank: tuple[Tensor, int] | tuple[()] = (),
    ):
        self.u, self.segments = u, segments
        self.acc, self.acc_bytes = A.dtype, A.itemsize
        self.images, self.dim = u.shape[0], u.shape[-1]
        self.columns = blocks_of(self.dim, LANES) * self.images
        self.rows = segments.rows
        self._inputs = (u, delta, A, B, bias)
        self._sizes = (*segments, self.images, self.dim)
        self._low_rank = low_rank
        self.workspace = self.new_workspace()
        self.members = self._members(self.workspace)

    def new_workspace(self) -> Tensor:
        """For one pass over the segments: see ``Carries`` in ``scan.cuh``."""
        size = self.images * self.rows * self.dim * (2 * self.segments.per_row + 3)
        return torch.empty(size, dtype=self.acc, device=self.u.device)

    def _members(self, workspace: Tensor) -> tuple[Tensor | int, ...]:
        """``ScanArgs`` of ``cuda.h``, or ``LowRankArgs`` of ``scan.cuh``."""
        return (*self._inputs, workspace, *self._sizes, *self._low_rank)

    def launch_carries(self, kernels: Any) -> None:
        """Leave in the workspace what a kernel needs to compute the states of any segment."""
        self._launch_carries(kernels.reduce, kernels.carry, self.workspace, 0)

    def _launch_carries(
        self, reduce: Launch, carry: Launch, workspace: Tensor, reverse: int, *members: Tensor
    ) -> None:
        map_bytes = 2 * self.acc_bytes * LANES  # of a warp's affine maps
        warps = min(self.segments.per_row, constant("kScanWarps"))
        arguments = (*self._members(workspace), *members)
        reduce(self.columns * self.rows, warps, warps * map_bytes, *arguments)
        warps = min(self.rows, constant("kCarryWarps"))
        carry(self.columns, warps, warps * map_bytes, workspace, *self._sizes, reverse)

    def launch_backward(self, kernels: Any, grad_h: Tensor, *observed: Tensor) -> list[Tensor]:
        """Gradients of u, delta, A, B, bias from that of the states; then of D if it is observed.

        Args:
            kernels: with ``reduce_adjoint``, ``carry`` and ``apply_adjoint``.
            grad_h: as u, in the accumulation dtype.
            observed: for an observation ``y = ... + D u``, which adds ``D grad_y`` to the gradient
                of u: grad_y, as u, and D.
        """
        u = self.u
        grad_u, grad_delta = torch.empty_like(u), torch.empty_like(u)
        grad_B = u.new_empty((blocks_of(self.dim, LANES), *u.shape[:-1]), dtype=self.acc)
        of_channels = [  # the gradients of A, bias and D, in parts
            u.new_empty((self.images, self.rows, self.dim), dtype=self.acc)
            for _ in range(3 if observed else 2)
        ]
        if self.images:
            adjoint = self.new_workspace()
            self._launch_carries(kernels.reduce_adjoint, kernels.carry, adjoint, 1, grad_h)
            warps = min(self.segments.per_row, constant("kAdjointWarps"))
            shared_bytes = warps * constant("kMaxSegment") * LANES * self.acc_bytes
            grad_A, grad_bias, *grad_D = of_channels
            outputs = (grad_u, grad_delta, grad_B, grad_A, grad_bias)
            observation = (*observed, *grad_D) if observed else (0, 0, 0)
            members = (*self.members, grad_h, adjoint, *outputs, *observation)
            kernels.apply_adjoint(self.columns * self.rows, warps, shared_bytes, *members)
        A, bias, *D = (part.sum((0, 1)) for part in of_channels)
        return [grad_u, grad_delta, A, grad_B.sum(0), bias, *D]


def _prepare(
    op: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor
) -> tuple[torch.dtype, Scan]:
    """Check the inputs, and convert them to the dtype and layout that kernels take."""
    if u.dim() != 3 or 0 in u.shape[1:]:
        raise ValueError(f"{op}: u must be [B, L, D] with L, D >= 1, got {list(u.shape)}")
    images, length, dim = u.shape
    if dim >= MAX_SIDE:
        raise ValueError(f"{op}: u must have less than 2^26 channels, got {dim}")
    check_arguments(
        op,
        u,
        [
            ("delta", delta, u.shape),
            ("A", A, (dim,)),
            ("B", B, (images, length)),
            ("delta_bias", delta_bias, (dim,)),
        ],
    )
    dtype = torch.promote_types(u.dtype, delta.dtype)
    u, delta = contiguous_as(dtype, u, delta)
    A, B, delta_bias = contiguous_as(accumulation_dtype(u), A, B, delta_bias)
    return dtype, Scan(u, delta, A, B, delta_bias, sequence_segments(length))


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.selective_scan`."""
    dtype, scan = _prepare("selective_scan", u, delta, A, B, delta_bias)
    kernels = FORWARD.on(u.device, dtype)
    h = scan.u.new_empty(u.shape, dtype=scan.acc)
    if h.numel():
        scan.launch_carries(kernels)
        warps = min(scan.segments.per_row, constant("kScanWarps"))
        kernels.apply(scan.columns * scan.rows, warps, 0, *scan.members, h)
    return h.to(accumulation_dtype(u))


def selective_scan_backward(
    grad_output: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of all inputs, in order."""
    op = "selective_scan_backward"
    inputs = (u, delta, A, B, delta_bias)
    dtype, scan = _prepare(op, *inputs)
    check_arguments(op, u, [("grad_output", grad_output, u.shape)])
    kernels = BACKWARD.on(u.device, dtype)
    (grad_h,) = contiguous_as(scan.acc, grad_output)
    if scan.images:
        scan.launch_carries(kernels)
    return in_dtypes_of(inputs, scan.launch_backward(kernels, grad_h))
