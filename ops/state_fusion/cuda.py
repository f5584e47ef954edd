"""``spatial_mamba::state_fusion`` on CUDA devices: launches of the kernels in ``fusion.cuh``."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    LANES,
    MAX_SIDE,
    Launch,
    blocks_of,
    check_arguments,
    check_map,
    contiguous_as,
)
from spatial_mamba_d2.ops.cuda.kernels import KernelSet
from spatial_mamba_d2.ops.cuda.source import constants
from spatial_mamba_d2.ops.state_fusion.taps import RADIUS, TAPS

FORWARD = KernelSet(
    "state_fusion/fusion.cuh", fuse="fuse_tiles<{Acc}, LoadRows<{T}>, StoreFused<{T}>>"
)
BACKWARD = KernelSet(
    "state_fusion/fusion.cuh",
    grad_input="grad_input_tiles<{Acc}, LoadGradient<{Acc}>, {T}>",
    grad_taps="fuse_tiles<{Acc}, LoadRows<{T}>, GradTaps<{T}>>",
)

# Blocks that a multiprocessor holds at once: the kernels' launch bounds ask for it.
BLOCKS_PER_MULTIPROCESSOR = 2
# Shared memory that each block takes for the system, since compute capability 8.0.
RESERVED_BYTES = 1024


class Tiles(NamedTuple):
    """How a map is cut: ``Tiles`` of ``cuda.h``, in the same order."""

    images: int
    height: int
    width: int
    dim: int
    tile_width: int
    tiles: int
    band_height: int
    bands: int

    @property
    def parts(self) -> int:
        """Number of blocks of threads per 32 channels; each writes partial sums."""
        return self.images * self.bands * self.tiles

    @property
    def blocks(self) -> int:
        return blocks_of(self.dim, LANES) * self.parts


@cache
def tile_shape(accumulator_bytes: int) -> tuple[int, int]:
    """Rows that a block fuses at once, one for each warp, and columns of a tile, at most."""
    found = constants("state_fusion/cuda.h")
    shape = "TileShape" if accumulator_bytes == 4 else "TileShape<double>"
    return found[f"{shape}.kRows"], found[f"{shape}.kWidth"]


def tile_bytes(width: int, accumulator_bytes: int) -> int:
    """Shared memory of a block: a ring buffer of rows, with a halo on all sides.

    In the end, the buffer holds the warps' sums of the taps' gradients.
    """
    rows, _ = tile_shape(accumulator_bytes)
    values = max((rows + 2 * RADIUS) * (width + 2 * RADIUS), rows * TAPS)
    return accumulator_bytes * values * LANES


@cache
def widest_tile(accumulator_bytes: int, shared_bytes: int) -> tuple[int, int]:
    """Columns of a tile, at most, and blocks that a multiprocessor then holds.

    Two blocks of narrower tiles hide more latency than one of the widest, as on GPUs with 100 KiB
    of shared memory; but more of a tile is halo, so its width is more than half of the widest.

    Args:
        accumulator_bytes: of a state.
        shared_bytes: the most that a block can have on the device.
    """
    _, most = tile_shape(accumulator_bytes)
    available = (shared_bytes + RESERVED_BYTES) // BLOCKS_PER_MULTIPROCESSOR - RESERVED_BYTES
    for width in range(most, most // 2, -1):
        if tile_bytes(width, accumulator_bytes) <= available:
            return width, BLOCKS_PER_MULTIPROCESSOR
    return most, 1


@lru_cache(4096)
def _cut(
    shape: tuple[int, ...], accumulator_bytes: int, multiprocessors: int, shared_bytes: int
) -> Tiles:
    images, height, width, dim = shape
    if max(height, width, dim) >= MAX_SIDE:
        raise ValueError(
            f"CUDA kernels take maps with less than 2^26 rows, columns and channels, "
            f"got {list(shape)}"
        )
    rows, _ = tile_shape(accumulator_bytes)
    most, resident = widest_tile(accumulator_bytes, shared_bytes)
    tiles = blocks_of(width, most)
    columns = images * tiles * blocks_of(dim, LANES)
    at_once = multiprocessors * resident

    def rows_of_time(band: int) -> int:
        return blocks_of(columns * blocks_of(height, band), at_once) * (band + 2 * RADIUS)

    most_rows = max(blocks_of(height, rows), 2) * rows
    band = min(range(most_rows, rows, -rows), key=rows_of_time)
    return Tiles(
        *(images, height, width, dim),
        *(blocks_of(width, tiles), tiles, band, blocks_of(height, band)),
    )


class Limits(Protocol):
    """What :func:`cut` has to know of a device."""

    @property
    def multiprocessors(self) -> int: ...

    @property
    def shared_bytes(self) -> int:
        """The most that a block can have."""


def cut(shape: tuple[int, ...], accumulator_bytes: int, device: Limits) -> Tiles:
    """Cut a map ``[B, H, W, D]`` into tiles for a device.

    Bands have the height that takes the fewest rows of time: those of a band, with its halo, which
    it computes again, for each wave of blocks. Of equally good ones, the highest.

    Raises:
        ValueError: a side of the map is too long.
    """
    return _cut(shape, accumulator_bytes, device.multiprocessors, device.shared_bytes)


def over_tiles(launch: Launch, tiles: Tiles, taps: Tensor, *members: Tensor | int) -> None:
    """Launch ``fuse_tiles`` or ``grad_input_tiles``; ``members`` are those of source and sink."""
    size = taps.itemsize
    shared_bytes = tile_bytes(tiles.tile_width, size)
    launch(tiles.blocks, tile_shape(size)[0], shared_bytes, *tiles, taps, *members)


def _check(op: str, h: Tensor, taps: Tensor) -> None:
    check_map(op, "h", h)
    check_arguments(op, h, [("taps", taps, (TAPS, h.shape[3]))])


def state_fusion(h: Tensor, taps: Tensor) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.state_fusion`."""
    _check("state_fusion", h, taps)
    kernels = FORWARD.on(h.device, h.dtype)
    acc = accumulation_dtype(h)
    out = torch.empty(h.shape, dtype=acc, device=h.device)
    if out.numel():
        (h,), (taps,) = contiguous_as(h.dtype, h), contiguous_as(acc, taps)
        tiles = cut(tuple(h.shape), acc.itemsize, kernels)
        over_tiles(kernels.fuse, tiles, taps, h, out)
    return out


def state_fusion_backward(grad_output: Tensor, h: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``h`` and ``taps``."""
    _check("state_fusion_backward", h, taps)
    check_arguments("state_fusion_backward", h, [("grad_output", grad_output, h.shape)])
    kernels = BACKWARD.on(h.device, h.dtype)
    acc = accumulation_dtype(h)
    tiles = cut(tuple(h.shape), acc.itemsize, kernels)
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_taps = torch.empty((tiles.parts, *taps.shape), dtype=acc, device=h.device)
    if h.numel():
        (h,) = contiguous_as(h.dtype, h)
        grad, wide_taps = contiguous_as(acc, grad_output, taps)
        over_tiles(kernels.grad_input, tiles, wide_taps, grad, 0, grad_h)
        over_tiles(kernels.grad_taps, tiles, wide_taps, h, grad, grad_taps)
    return grad_h, grad_taps.sum(0).to(taps.dtype)
