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


def _token_stride(x: Tensor) -> int | None:
    """The distance from token to token of a ``Tensor[B, H, W, D]``.

    None if tokens are not evenly spaced or their channels not dense.
    """
    stride, inner = None, 1
    for size, distance in zip(x.shape[2::-1], x.stride()[2::-1], strict=True):
        if size == 1:
            continue
        stride = distance if stride is None else stride
        if distance != stride * inner:
            return None
        inner *= size
    stride = x.shape[3] if stride is None else stride
    is_dense = x.shape[3] == 1 or x.stride(3) == 1
    return stride if is_dense and stride < 2**28 else None  # kernels compute in 32 bits


def with_even_tokens(x: Tensor) -> tuple[Tensor, int]:
    """``Tensor[B, H, W, D]`` with dense channels, and the distance from token to token.

    ``x`` is copied unless its tokens are evenly spaced, as in a slice of the channels of a
    contiguous map.
    """
    stride = _token_stride(x)
    return (x.contiguous(), x.shape[3]) if stride is None else (x, stride)


def memory_for(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Memory for a map that ``x`` is to become, and its distance from token to token.

    That is ``x`` itself if it has this dtype, and tokens as above that do not overlap; else new
    memory, which :func:`copy_back` copies to ``x``.
    """
    stride = _token_stride(x) if x.dtype is dtype else None
    if stride is None or stride < x.shape[3]:
        return torch.empty(x.shape, dtype=dtype, device=x.device), x.shape[3]
    return x, stride


def copy_back(x: Tensor, memory: Tensor) -> None:
    """Copy what has been written into :func:`memory_for` to ``x``."""
    if memory is not x:
        x.copy_(memory)


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
