"""The precision in which operators accumulate, and the outputs that they allocate."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def set_tf32_of_convolutions(on: bool) -> Callable[[], None]:
    """Let cuDNN round inputs of float32 convolutions to TF32, or not.

    Since PyTorch 2.9 the setting has two names, and whoever reads the older one, as
    ``torch.export`` does, gets an error where they disagree. So both are set, and that for RNNs.

    Returns:
        What restores the settings.
    """
    cudnn: Any = torch.backends.cudnn
    before: list[tuple[Any, str, Any]] = []
    with suppress(RuntimeError):  # they disagree already, so that it cannot be restored
        before.append((cudnn, "allow_tf32", cudnn.allow_tf32))
    if hasattr(cudnn, "conv"):
        before += [(x, "fp32_precision", x.fp32_precision) for x in (cudnn.conv, cudnn.rnn)]
    for owner, name, _ in before:
        setattr(owner, name, on if name == "allow_tf32" else ("tf32" if on else "ieee"))

    def restore() -> None:
        for setting in before:
            setattr(*setting)

    return restore


class _Inside:
    """Threads inside :func:`without_tf32`, and what restores the settings."""

    lock = threading.Lock()
    num_threads = 0
    restore: Callable[[], None]


@contextmanager
def without_tf32(x: Tensor) -> Iterator[None]:
    """Let float32 convolutions on CUDA devices keep all bits; cuDNN rounds inputs by default.

    The setting is that of the process. It is restored when the last thread leaves: autograd runs
    backward passes in threads of its own.
    """
    if not x.is_cuda:
        yield
        return
    with _Inside.lock:
        if not _Inside.num_threads:
            _Inside.restore = set_tf32_of_convolutions(on=False)
        _Inside.num_threads += 1
    try:
        yield
    finally:
        with _Inside.lock:
            _Inside.num_threads -= 1
            if not _Inside.num_threads:
                _Inside.restore()


def empty_output(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized contiguous memory of the shape of ``like``, in its dtype or the one given."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
