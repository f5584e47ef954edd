"""Which of PyTorch's two libraries for matrix products is faster on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.system.once import once_per_machine
from spatial_mamba_d2.system.processor import describe_processor

_ROUNDS = 7
#: MKL's rate was 0.97 to 1.08 of oneDNN's on two Intel Xeons and 0.44 of it on an AMD EPYC with
#: AVX-512, so that no error of a measurement changes the answer there.
_KEEPS_UP = 0.7


@cache
def linear_layers_keep_up() -> bool:
    """Whether linear layers in float32 are about as fast as 1x1 convolutions on this processor.

    PyTorch computes linear layers by the BLAS that it was built with, MKL on x86, and convolutions
    by oneDNN. The first call on a machine measures for less than 0.1 seconds; the result is
    remembered, so that all processes there compute the same.
    """
    if not torch.backends.mkldnn.is_available():
        return True
    machine = describe_processor()
    parameters = [1, machine["processor"], machine["capability"], torch.__version__]
    ratio = once_per_machine("matrix_rates", [], parameters, _measure, keep=lambda _: True)
    return float(ratio) >= _KEEPS_UP


def _measure() -> float:
    """Rate of a linear layer divided by that of the same 1x1 convolution."""
    # A thread of its own knows nothing of autocast, modes and the default device of this one.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_ratio).result()


@torch.no_grad()
def _ratio() -> float:
    # 16 images: with fewer, PyTorch does not use oneDNN for 1x1 convolutions on one thread
    x = torch.full((16, 16, 16, 256), 0.5, dtype=torch.float32, device="cpu")
    weight = torch.full((256, 256), 0.5, dtype=torch.float32, device="cpu")
    image, kernel = x.permute(0, 3, 1, 2), weight[:, :, None, None]
    candidates: tuple[Callable[[], Tensor], ...] = (
        lambda: F.linear(x, weight),
        lambda: F.conv2d(image, kernel),
    )
    seconds = [float("inf")] * len(candidates)
    for _ in range(_ROUNDS):
        for index, candidate in enumerate(candidates):
            start = time.perf_counter()
            candidate()
            seconds[index] = min(seconds[index], time.perf_counter() - start)
    linear, convolution = seconds
    return convolution / linear
