"""``spatial_mamba::state_fusion`` on CUDA devices: launches of the kernels in ``fusion.cuh``."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import accumulation_dtype
from spatial_mamba_d2.ops.cuda.arguments import (
    LANES,
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

# Blocks that a multiprocessor holds at once: the kernels' launch bounds ask for it. Where shared
# memory allows one only, waves are twice as many, for each number of bands.
BLOCKS_PER_MULTIPROCESSOR = 2


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


@cache
def tile_bytes(accumulator_bytes: int) -> int:
    """Shared memory of a block: a ring buffer of rows, with a halo on all sides."""
    rows, width = tile_shape(accumulator_bytes)
    return accumulator_bytes * (rows + 2 * RADIUS) * (width + 2 * RADIUS) * LANES


@lru_cache(4096)
def cut(
    images: int, height: int, width: int, dim: int, accumulator_bytes: int, multiprocessors: int
) -> Tiles:
    """Cut a map into tiles for a device.

    Bands have the height that takes the fewest rows of time: those of a band, with its halo, which
    it computes again, for each wave of blocks. Of equally good ones, the highest.
    """
    rows, most = tile_shape(accumulator_bytes)
    tiles = blocks_of(width, most)
    columns = images * tiles * blocks_of(dim, LANES)
    at_once = multiprocessors * BLOCKS_PER_MULTIPROCESSOR

    def rows_of_time(band: int) -> int:
        return blocks_of(columns * blocks_of(height, band), at_once) * (band + 2 * RADIUS)

    most_rows = max(blocks_of(height, rows), 2) * rows
    band = min(range(most_rows, rows, -rows), key=rows_of_time)
    return Tiles(
        *(images, height, width, dim),
        *(blocks_of(width, tiles), tiles, band, blocks_of(height, band)),
    )


def over_tiles(launch: Launch, tiles: Tiles, taps: Tensor, *members: Tensor | int) -> None:
    """Launch ``fuse_tiles`` or ``grad_input_tiles``; ``members`` are those of source and sink."""
    size = taps.itemsize
    launch(tiles.blocks, tile_shape(size)[0], tile_bytes(size), *tiles, taps, *members)


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
        tiles = cut(*h.shape, acc.itemsize, kernels.multiprocessors)
        over_tiles(kernels.fuse, tiles, taps, h, out)
    return out


def state_fusion_backward(grad_output: Tensor, h: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``h`` and ``taps``."""
    _check("state_fusion_backward", h, taps)
    check_arguments("state_fusion_backward", h, [("grad_output", grad_output, h.shape)])
    kernels = BACKWARD.on(h.device, h.dtype)
    acc = accumulation_dtype(h)
    tiles = cut(*h.shape, acc.itemsize, kernels.multiprocessors)
    grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    grad_taps = torch.empty((tiles.parts, *taps.shape), dtype=acc, device=h.device)
    if h.numel():
        (h,) = contiguous_as(h.dtype, h)
        grad, wide_taps = contiguous_as(acc, grad_output, taps)
        over_tiles(kernels.grad_input, tiles, wide_taps, grad, 0, grad_h)
        over_tiles(kernels.grad_taps, tiles, wide_taps, h, grad, grad_taps)
    return grad_h, grad_taps.sum(0).to(taps.dtype)
