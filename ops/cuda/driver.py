"""NVIDIA's driver: loads compiled kernels, and starts them on PyTorch's current stream.

It is called through ctypes, as NVRTC is. Kernels run in the device's primary context, which is
PyTorch's.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from functools import cache

import torch
from torch import Tensor

from spatial_mamba_d2.ops.cuda import cache as disk
from spatial_mamba_d2.ops.cuda import nvrtc
from spatial_mamba_d2.ops.cuda.arguments import LANES, Launch, pack

_MAX_SHARED_BYTES_OPT_IN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# What the driver answers to machine code that it cannot run: invalid image, no kernel image for the
# device, PTX or file of an unsupported version.
_UNFIT = (200, 209, 222, 223, 300)


@cache
def library() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        UnavailableError: it is not found.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        lib = ctypes.CDLL(name)
    except OSError as error:
        raise nvrtc.UnavailableError(f"NVIDIA's driver cannot be loaded: {error}") from error
    lib.cuLaunchKernel.argtypes = (
        [c_void_p] + [c_uint] * 7 + [c_void_p, c_void_p, c_void_p]
    )  # function, grid, block, shared bytes, stream, arguments, extra
    lib.cuCtxGetCurrent.argtypes = [c_void_p]
    return lib


def _check(status: int, what: str) -> None:
    """Raise ``RuntimeError`` if a call has failed."""
    if status:
        name, text = c_char_p(), c_char_p()
        library().cuGetErrorName(status, byref(name))
        library().cuGetErrorString(status, byref(text))
        reason = f"{(text.value or b'unknown error').decode()} ({(name.value or b'').decode()})"
        error = nvrtc.UnavailableError if status in _UNFIT else RuntimeError
        raise error(f"spatial_mamba: {what}: {reason}")


class CudaDevice:
    """One GPU, see :class:`~.kernels.Device`."""

    def __init__(self, device: torch.device):
        self.index = device.index
        properties = torch.cuda.get_device_properties(device)
        self.multiprocessors = properties.multi_processor_count
        self.architecture = nvrtc.architecture_for(properties.major, properties.minor)
        handle, context, opt_in = c_int(), c_void_p(), c_int()
        lib = library()
        _check(lib.cuDeviceGet(byref(handle), self.index), f"no device {self.index}")
        _check(
            lib.cuDevicePrimaryCtxRetain(byref(context), handle),
            f"the context of device {self.index} is not available",
        )
        self.context = context.value
        _check(
            lib.cuDeviceGetAttribute(byref(opt_in), _MAX_SHARED_BYTES_OPT_IN, handle),
            "the size of shared memory is unknown",
        )
        self.shared_bytes = opt_in.value

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context current: a thread may have none yet, or another device's."""
        lib, ours = library(), c_void_p(self.context)
        _check(lib.cuCtxPushCurrent_v2(ours), "the device's context cannot be entered")
        try:
            yield
        finally:
            lib.cuCtxPopCurrent_v2(byref(ours))

    def load(self, text: str, names: Sequence[str], title: str) -> list[Launch]:
        """See :class:`~.kernels.Device`."""
        image = disk.compiled(text, names, self.architecture, title)
        with self.current():
            module = c_void_p()
            _check(
                library().cuModuleLoadData(byref(module), image.code),
                f"kernels of {title} cannot be loaded",
            )
            return [self._function(module, name, image.symbols[name]) for name in names]

    def _function(self, module: c_void_p, name: str, symbol: str) -> Launch:
        lib, function = library(), c_void_p()
        _check(lib.cuModuleGetFunction(byref(function), module, symbol.encode()), name)
        _check(lib.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, self.shared_bytes), name)
        address, ours, index = function.value, self.context, self.index
        start, get_context = lib.cuLaunchKernel, lib.cuCtxGetCurrent
        current_stream = torch._C._cuda_getCurrentRawStream

        def launch(blocks: int, warps: int, shared_bytes: int, *members: Tensor | int) -> None:
            argument = c_char_p(pack(name, blocks, members))
            stream = current_stream(index)
            call = (address, blocks, 1, 1, LANES, warps, 1, shared_bytes, stream, byref(argument))
            current = c_void_p()
            get_context(byref(current))
            if current.value == ours:
                status = start(*call, None)
            else:
                with self.current():
                    status = start(*call, None)
            if status:
                _check(status, f"{name} cannot be started, or an operation before it has failed")

        return launch
