"""NVRTC, NVIDIA's compiler as a library: CUDA C++ to machine code.

It is called through ctypes. Its C interface has been the same since CUDA 11. NVIDIA's Python
bindings (``cuda-bindings``) would be a second way to the same library: not all versions of PyTorch
that we support require them, and their module was renamed. Neither a GPU nor a toolkit, a C++
compiler or a header is needed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

#: the first architecture whose blocks can have the 63 KiB of shared memory that kernels take
OLDEST = 70
#: of every compilation; all of our functions run on the device
OPTIONS = ("--std=c++17", "-default-device")


class UnavailableError(RuntimeError):
    """CUDA kernels cannot run here, whatever the operator; the message says why, in one line."""


class CompilationError(UnavailableError):
    """NVRTC rejects our sources."""


class Image(NamedTuple):
    """Compiled kernels."""

    code: bytes
    symbols: dict[str, str]  # of the kernels, by their names in C++
    log: str


def _candidates() -> Iterator[str]:
    """Where the library may be. ``SMD2_NVRTC`` is the file to use instead."""
    if chosen := os.environ.get("SMD2_NVRTC"):
        yield chosen
        return
    major = str(torch.version.cuda).partition(".")[0]
    if sys.platform == "win32":
        name = f"nvrtc64_{major}0_0.dll"
        yield str(Path(torch.__file__).parent / "lib" / name)
    else:
        name = f"libnvrtc.so.{major}"
        # NVIDIA's wheels are next to PyTorch's: of CUDA 13 and later, of CUDA 12.
        for folder in (f"cu{major}", "cuda_nvrtc"):
            yield str(Path(torch.__file__).parents[1] / "nvidia" / folder / "lib" / name)
    yield name  # loaded already, or where the system looks


@cache
def library() -> ctypes.CDLL:
    """The library for PyTorch's version of CUDA.

    Raises:
        UnavailableError: PyTorch is built without CUDA, or the library is not found.
    """
    if torch.version.cuda is None:
        raise UnavailableError("PyTorch is built without CUDA")
    if torch.version.hip is not None:
        raise UnavailableError("PyTorch is built for ROCm")
    candidates = list(_candidates())
    for candidate in candidates:
        try:
            lib = ctypes.CDLL(candidate)
        except OSError:
            continue
        lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        return lib
    raise UnavailableError(
        f"NVRTC of CUDA {torch.version.cuda} is not found (tried {', '.join(candidates)}); "
        "install PyTorch with NVIDIA's packages, or set SMD2_NVRTC to the library"
    )


def _check(status: int) -> None:
    if status:
        raise UnavailableError(f"NVRTC: {library().nvrtcGetErrorString(status).decode()}")


@cache
def version() -> tuple[int, int]:
    """Such as ``(13, 0)``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@cache
def architectures() -> tuple[int, ...]:
    """What it compiles our kernels for, such as ``(75, 80, ...)``."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(numbers))
    return tuple(sorted(number for number in numbers if number >= OLDEST))


def architecture_for(major: int, minor: int) -> int:
    """The architecture to compile for, given a GPU's compute capability.

    Machine code also runs on GPUs with the same major version and a later minor one.

    Raises:
        UnavailableError: the GPU is too old, or NVRTC knows no architecture that it can run.
    """
    if 10 * major + minor < OLDEST:
        raise UnavailableError(
            f"this GPU has compute capability {major}.{minor}, and kernels need 7.0 or later"
        )
    fitting = [x for x in architectures() if x // 10 == major and x % 10 <= minor]
    if not fitting:
        known = ", ".join(map(str, architectures()))
        raise UnavailableError(
            f"NVRTC {version()[0]}.{version()[1]} does not compile for sm_{major}{minor}, the "
            f"architecture of this GPU, only for {known}"
        )
    return fitting[-1]


def compile_kernels(
    text: str, names: Sequence[str], architecture: int, *options: str, title: str = "kernels"
) -> Image:
    """Compile a source without includes.

    Args:
        text: the source.
        names: the kernels to compile, as C++ expressions such as ``reduce<float>``.
        architecture: such as 90.
        options: in addition to :data:`OPTIONS`.
        title: of the source, for messages.

    Raises:
        CompilationError: with the first line of the compiler's log.
    """
    lib, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    source = text.encode()
    _check(
        lib.nvrtcCreateProgram(ctypes.byref(program), source, f"{title}.cu".encode(), 0, None, None)
    )

    def read(what: str) -> bytes:
        _check(getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        _check(getattr(lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def symbol(name: str) -> str:
        found = ctypes.c_char_p()
        _check(lib.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(found)))
        return (found.value or b"").decode()

    try:
        for name in names:
            _check(lib.nvrtcAddNameExpression(program, name.encode()))
        flags = [f"--gpu-architecture=sm_{architecture}", *OPTIONS, *options]
        encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        status = lib.nvrtcCompileProgram(program, len(flags), encoded)
        log = read("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            reason = lib.nvrtcGetErrorString(status).decode()
            first = next((line for line in log.splitlines() if "error" in line), log[:200])
            raise CompilationError(f"NVRTC cannot compile {title}: {reason}: {first}")
        return Image(read("CUBIN"), {name: symbol(name) for name in names}, log)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))
