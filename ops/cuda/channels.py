"""How kernels access several channels of a token at once: see ``channels.cuh``."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_of_thread(acc: torch.dtype) -> int:
    """``kPack``: as many as give 16 bytes of sums in ``acc``."""
    return 16 // acc.itemsize


def cpp_bool(value: bool) -> str:
    """As a template argument."""
    return str(value).lower()


def with_even_tokens(x: Tensor) -> tuple[Tensor, int]:
    """``Tensor[B, H, W, D]`` with dense channels, and the distance from token to token.

    ``x`` is copied unless its tokens are evenly spaced, as in a slice of the channels of a
    contiguous map.
    """
    stride, inner = None, 1
    for size, distance in zip(x.shape[2::-1], x.stride()[2::-1], strict=True):
        if size == 1:
            continue
        stride = distance if stride is None else stride
        if distance != stride * inner:
            break
        inner *= size
    else:
        stride = x.shape[3] if stride is None else stride
        if (x.shape[3] == 1 or x.stride(3) == 1) and stride < 2**28:  # kernels compute in 32 bits
            return x, stride
    return x.contiguous(), x.shape[3]


def are_packed(count: int, stride: int, x: Tensor, *others: Tensor) -> bool:
    """Whether one instruction can load or store ``count`` channels of any of these tensors.

    Args:
        stride: of ``x``, from token to token.
        others: contiguous, with as many channels as ``x``.
    """
    return (
        x.shape[-1] % count == 0
        and stride % count == 0
        and all(t.data_ptr() % (count * t.itemsize) == 0 for t in (x, *others))
    )
