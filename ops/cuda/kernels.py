"""How an operator declares its kernels and launches them, on a GPU or in the tests' emulator.

    FORWARD = KernelSet("selective_scan/scan.cuh", apply="apply<{T}>")

    kernels = FORWARD.on(u.device, u.dtype)       # compiled and loaded at the first call
    kernels.apply(blocks, warps, shared_bytes, *members of the kernel's argument)

A kernel has one argument, a struct of members of 8 bytes; ``members`` are tensors, which stand for
their data pointers, and integers; 0 is a null pointer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import torch

from spatial_mamba_d2.ops.cuda import cache as disk
from spatial_mamba_d2.ops.cuda import driver, nvrtc
from spatial_mamba_d2.ops.cuda.arguments import Launch
from spatial_mamba_d2.ops.cuda.nvrtc import UnavailableError
from spatial_mamba_d2.ops.cuda.source import bundle

#: the dtypes that kernels are compiled for, as C++ names them
CPP_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "c10::Half",
    torch.bfloat16: "c10::BFloat16",
}


class Device(Protocol):
    """Something that runs kernels."""

    multiprocessors: int
    shared_bytes: int  # the most that a block can have

    def load(self, text: str, names: Sequence[str], title: str) -> list[Launch]:
        """Compile the kernels of these names from a source, and load them."""


#: how a device is opened, by the type of tensors' devices; tests add an emulator, and
#: profiling a device that only counts
OPENERS: dict[str, Callable[[torch.device], Device]] = {"cuda": driver.CudaDevice}


def run_on(x: torch.Tensor) -> bool:
    """Whether operators that have CUDA kernels only are to be used for ``x``.

    Graphs for export consist of PyTorch's operators instead, as those for CPUs do.
    """
    return x.device.type in OPENERS and not torch.compiler.is_exporting()


class Kernels:
    """Kernels of one set, loaded on one device for one dtype: each name is a :data:`Launch`."""

    def __init__(self, device: Device, launches: dict[str, Launch]):
        self.multiprocessors = device.multiprocessors
        self.shared_bytes = device.shared_bytes
        vars(self).update(launches)

    def __getattr__(self, name: str) -> Launch:
        raise AttributeError(f"this set of kernels has no {name!r}")


class KernelSet:
    """Kernels that are compiled and loaded together.

    Args:
        source: path in ``ops/``.
        kernels: C++ expressions of the kernels by the names that launch code calls them; ``{T}``
            stands for the type of activations and ``{Acc}`` for that of sums.
    """

    ALL: list[KernelSet] = []

    def __init__(self, source: str, **kernels: str):
        self.source = source
        self.kernels = kernels
        # The kernels, or why there are none. Not an error: it keeps the frames that it passes, and
        # their tensors.
        self._loaded: dict[tuple[torch.device, torch.dtype], Kernels | str] = {}
        self.ALL.append(self)

    def cpp_names(self, dtype: torch.dtype) -> list[str]:
        """The C++ expressions, in the order of declaration."""
        scalar = CPP_TYPES[dtype]
        types = {"T": scalar, "Acc": "double" if scalar == "double" else "float"}
        return [kernel.format_map(types) for kernel in self.kernels.values()]

    def on(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The kernels on a device, as :class:`Kernels`.

        Raises:
            UnavailableError: CUDA kernels cannot run there.
        """
        try:
            found = self._loaded[device, dtype]
        except KeyError:
            with _LOADING:
                found = self._loaded.get((device, dtype)) or self._load(device, dtype)
                self._loaded[device, dtype] = found
        if isinstance(found, str):
            raise UnavailableError(found)
        return found

    def _load(self, device: torch.device, dtype: torch.dtype) -> Kernels | str:
        if dtype not in CPP_TYPES:
            known = ", ".join(map(str, CPP_TYPES))
            raise ValueError(f"{self.source}: the dtype must be one of {known}, got {dtype}")
        try:
            opened = _open(device)
            launches = opened.load(bundle(self.source), self.cpp_names(dtype), self.source)
        except UnavailableError as error:
            return str(error)
        return Kernels(opened, dict(zip(self.kernels, launches, strict=True)))


_LOADING = threading.RLock()


@cache
def _open(device: torch.device) -> Device:
    return OPENERS[device.type](device)


def unload() -> None:
    """Forget devices and their kernels, for measurements and tests that put others in place."""
    _open.cache_clear()
    for kernel_set in KernelSet.ALL:
        kernel_set._loaded.clear()


def compile_ahead(architectures: Sequence[int]) -> Iterator[tuple[int, str, torch.dtype]]:
    """Fill the cache on disk: yields (architecture, source, dtype) before each set is compiled.

    float64 is left out, because models are not run in it.

    Raises:
        UnavailableError: NVRTC is missing, or does not compile for one of the architectures.
        OSError: there is no cache, or it cannot be written.
    """
    known = nvrtc.architectures()
    for architecture in architectures:
        if architecture not in known:
            raise UnavailableError(
                f"NVRTC compiles for {', '.join(map(str, known))}, not for {architecture}"
            )
    disk.check_writable()
    for architecture in architectures:
        for kernel_set in KernelSet.ALL:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                yield architecture, kernel_set.source, dtype
                text, names = bundle(kernel_set.source), kernel_set.cpp_names(dtype)
                disk.compiled(text, names, architecture, kernel_set.source)
