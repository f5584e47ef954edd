"""The precision in which operators accumulate, and the outputs that they allocate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and sums: float64 for float64 ``x``, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def precise(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the accumulation dtype of the first; those that have it are not copied."""
    dtype = accumulation_dtype(tensors[0])
    return [x.to(dtype) for x in tensors]


def precise_inside(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype in which PyTorch's convolutions and norms are to take them.

    On CUDA devices it is that of the first: these kernels read and write activations of 16 bits,
    and accumulate in float32 inside. On others, it is the accumulation dtype (:func:`precise`).
    """
    if tensors[0].is_cuda:
        return [x.to(tensors[0].dtype) for x in tensors]
    return precise(*tensors)


class _Inside:
    """Threads inside :func:`without_tf32`, and the setting to restore."""

    lock = threading.Lock()
    num_threads = 0
    before: Any = None


@contextmanager
def without_tf32(x: Tensor) -> Iterator[None]:
    """Let float32 convolutions on CUDA devices keep all bits; cuDNN rounds inputs by default.

    The setting is that of the process. It is restored when the last thread leaves: autograd runs
    backward passes in threads of its own.
    """
    if not x.is_cuda:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    setting: tuple[Any, str, Any] = (cudnn, "allow_tf32", False)
    if hasattr(cudnn, "conv"):  # since PyTorch 2.9, where reading the other may be an error
        setting = (cudnn.conv, "fp32_precision", "ieee")
    owner, name, exact = setting
    with _Inside.lock:
        if not _Inside.num_threads:
            _Inside.before = getattr(owner, name)
            setattr(owner, name, exact)
        _Inside.num_threads += 1
    try:
        yield
    finally:
        with _Inside.lock:
            _Inside.num_threads -= 1
            if not _Inside.num_threads:
                setattr(owner, name, _Inside.before)


def empty_output(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized contiguous memory of the shape of ``like``, in its dtype or the one given."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
