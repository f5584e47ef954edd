"""Arguments: of operators, checked and converted; of kernels, packed."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

LANES = 32  # threads of a warp, and channels that it processes
MAX_BLOCKS = 2**31 - 1
#: of a map, exclusive: the scan and the fusion add offsets of at most 32 tokens in 32 bits
MAX_SIDE = 2**26

#: starts a kernel: (blocks, warps per block, bytes of shared memory, *members of its argument)
Launch = Callable[..., None]


def check_map(op: str, name: str, x: Tensor, channels: str = "D") -> None:
    """Raise ``ValueError`` unless ``x`` has four axes, of which only the batch may be empty."""
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: {name} must be [B, H, W, {channels}] with H, W, {channels} >= 1, "
            f"got {list(x.shape)}"
        )


def check_arguments(
    op: str, like: Tensor, arguments: Sequence[tuple[str, Tensor, Sequence[int]]]
) -> None:
    """Raise ``ValueError`` unless the arguments fit: (name, tensor, required shape).

    All must be on the device of ``like``: the dispatcher calls a CUDA kernel if any of them is on a
    CUDA device.
    """
    device = like.device
    for name, x, shape in arguments:
        if x.shape != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(x.shape)}")
        if x.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def contiguous_as(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in a dtype, contiguous; those that are already are not copied."""
    return [
        x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous() for x in tensors
    ]


def in_dtypes_of(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each gradient in the dtype of its input."""
    return tuple(
        gradient if gradient.dtype is x.dtype else gradient.to(x.dtype)
        for gradient, x in zip(gradients, inputs, strict=True)
    )


def blocks_of(count: int, size: int) -> int:
    """The number of blocks of ``size`` that hold ``count``."""
    return -(-count // size)


@cache
def float_bits(value: float) -> int:
    """A member of type ``double``."""
    return struct.unpack("q", struct.pack("d", value))[0]


@cache
def _struct(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


def pack(kernel: str, blocks: int, members: tuple[Tensor | int, ...]) -> bytes:
    """The argument of a kernel: each member, a tensor's pointer or an integer, in 8 bytes.

    Raises:
        ValueError: a GPU cannot start this number of blocks.
    """
    if not 0 < blocks <= MAX_BLOCKS:
        raise ValueError(f"{kernel}: the number of blocks must be 1 to 2^31 - 1, got {blocks}")
    numbers = [x if x.__class__ is int else x.data_ptr() for x in members]  # type: ignore[union-attr]
    return _struct(len(numbers)).pack(*numbers)
