"""Where these tests run: on a GPU; and, as far as that goes, on its kernels in the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from spatial_mamba_d2.models import optimized, packed
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.profiling.gpu import float32_precision
from tests.ops import emulator


@pytest.fixture(params=["emulated CUDA", "CUDA"])
def kernels(request, monkeypatch) -> Iterator[str]:
    """The kernels that run: those of a GPU, or the same ones in the emulator, for CPU tensors.

    Models take the paths that they take on a GPU in both.
    """
    on_gpu = request.param == "CUDA"
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if on_gpu:
        monkeypatch.setattr(_extension, "FORCED_BACKEND", "native")  # no falling back
    else:
        for module in (packed, optimized):
            monkeypatch.setattr(module, "is_on_cpu", lambda x: False)
    with nullcontext() if on_gpu else emulator.emulated_cuda(), float32_precision(tf32=False):
        yield request.param


@pytest.fixture
def device(kernels) -> str:
    """The device of the tensors."""
    return "cuda" if kernels == "CUDA" else "cpu"
