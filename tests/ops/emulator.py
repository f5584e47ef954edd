"""The CUDA kernels, built for the CPU by a plain C++ compiler, and run by their launch code.

Object files and programs are cached in ``build/cuda_emulator`` under a hash of all their inputs, so
a second run of the tests builds nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

import spatial_mamba_d2.ops  # noqa: F401  declares the kernels
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.cuda import kernels
from spatial_mamba_d2.ops.cuda.arguments import Launch, pack
from spatial_mamba_d2.ops.cuda.kernels import CPP_TYPES, KernelSet
from spatial_mamba_d2.ops.cuda.source import bundle

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests/cuda_emulator"
HEADERS = tuple(
    sorted([*ROOT.glob("ops/**/*.h"), *ROOT.glob("ops/**/*.cuh"), *EMULATOR.glob("*.h")])
)
RUNTIME = (EMULATOR / "simt_emulator.cpp", EMULATOR / "kernels.cpp")
#: of the kernels, in ``ops/``
SOURCES = tuple(dict.fromkeys(kernel_set.source for kernel_set in KernelSet.ALL))
#: operators with CUDA kernels, and their backward operators
OPERATORS = tuple(_extension.CUDA_KERNELS)
ORDERS = ("forward", "reverse", "random")
COMMON_HEADERS = (
    "<c10/util/BFloat16.h>",
    "<c10/util/Half.h>",
    "<cmath>",
    "<cstddef>",
    "<cstdint>",
    '"kernels.h"',
    "<simt_emulator.h>",
)
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # #pragma unroll is CUDA's


@cache
def compiler() -> str:
    """The C++ compiler; skips the test if it is missing."""
    name = os.environ.get("CXX", "c++")
    if sys.platform == "win32" or not shutil.which(name.split()[0]):
        pytest.skip(f"the emulator needs GCC or Clang; {name} was not found")
    return name


@cache
def _folder() -> Path:
    folder = ROOT / "build/cuda_emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="cuda_emulator"))
    return folder


def _make(command: Sequence[str], inputs: Sequence[Path], suffix: str) -> Path:
    """Run a command with ``-o <file>`` appended, unless its result is cached."""
    unplaced = (word for word in command if not word.startswith("-I"))  # contents matter
    digest = hashlib.sha256("\0".join([*unplaced, torch.__version__]).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = _folder() / f"{inputs[0].parent.name}-{inputs[0].stem}-{digest.hexdigest()}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            unfinished = Path(scratch) / target.name
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[:4000]}"
            unfinished.rename(target)
    return target


def _command(*flags: str) -> list[str]:
    options = ("-std=c++20", "-fPIC", *WARNINGS, *flags, f"-I{EMULATOR}")
    includes = (f"-isystem{path}" for path in cpp_extension.include_paths())
    return [*compiler().split(), *options, *includes]


@lru_cache(None)
def _precompiled(*flags: str) -> tuple[str, ...]:
    """Options that include, compiled for these flags, what all kernels include.

    Otherwise, reading these headers would take half of the time. Only GCC finds them in this way.
    """
    version = subprocess.run([*compiler().split(), "--version"], capture_output=True, text=True)
    if "Free Software Foundation" not in version.stdout:
        return ()
    text = "".join(f"#include {name}\n" for name in COMMON_HEADERS)
    header = _folder() / "common.h"
    header.write_text(text)
    headers = [header, *EMULATOR.glob("*.h")]
    compiled = _make([*_command(*flags), "-x", "c++-header", str(header)], headers, ".h.gch")
    found = compiled.with_suffix("")  # in its place, GCC reads the compiled one
    found.write_text(text)
    return "-include", str(found)


def compile_object(source: Path, *flags: str, root: Path = ROOT) -> Path:
    """``source`` compiled for the emulator, with the kernels in ``root``."""
    of_kernels = () if EMULATOR in source.parents else _precompiled(*flags)
    command = [*_command(*flags), *of_kernels, f"-I{root}", "-x", "c++", "-c", str(source)]
    headers = [root / path.relative_to(ROOT) for path in HEADERS if EMULATOR not in path.parents]
    return _make(command, [source, *headers, *EMULATOR.glob("*.h")], ".o")


def compile_all(sources: Sequence[Path], *flags: str) -> list[Path]:
    """:func:`compile_object` of each, in parallel."""
    compiler()  # skips in this thread
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_object(source, *flags), sources))


def link(objects: Sequence[Path], *flags: str, suffix: str = "") -> Path:
    """A program linked from these objects, or a library if ``-shared`` is among the flags."""
    command = [*compiler().split(), *map(str, objects), *flags]
    return _make(command, objects, suffix)


def kernel_source(source: str, dtype: torch.dtype) -> Path:
    """A C++ source that registers the kernels of all sets in one file, for one dtype."""
    sets = [kernel_set for kernel_set in KernelSet.ALL if kernel_set.source == source]
    names = dict.fromkeys(name for kernel_set in sets for name in kernel_set.cpp_names(dtype))
    lines = [f'#include "ops/{source}"', '#include "kernels.h"']
    lines += ["using namespace smd2::cuda;", "using smd2::emulator::Registration;"]
    for number, name in enumerate(names):
        lines.append(f'static const Registration r{number}("{name}", {name});')
    text = "\n".join(lines) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = _folder() / f"{Path(source).stem}-{digest}.cpp"
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    return path


def kernel_sources(
    dtypes: Sequence[torch.dtype] = tuple(CPP_TYPES), folder: str = ""
) -> list[Path]:
    """:func:`kernel_source` of all sources, or of those in one folder of ``ops/``."""
    return [
        kernel_source(source, dtype)
        for source in SOURCES
        for dtype in dtypes
        if source.startswith(folder)
    ]


@cache
def load() -> ctypes.CDLL:
    """The emulator with all kernels, as a library."""
    return _open(compile_all((*RUNTIME, *kernel_sources()), "-O1"))


def load_variant(root: Path, header: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The emulator with the kernels of one dtype; those that include ``header`` from ``root``."""
    included = f'#line 1 "{header}"'
    objects = compile_all(RUNTIME, "-O1")
    for source in SOURCES:
        text, kernels = bundle(source), kernel_source(source, dtype)
        if included in text:
            objects.append(compile_object(kernels, "-O0", root=root))
        else:
            objects.append(compile_object(kernels, "-O1"))
    return _open(objects)


def _open(objects: Sequence[Path]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(link(objects, "-shared", suffix=".so")))
    library.emulator_launch.restype = ctypes.c_char_p
    library.emulator_launch.argtypes = [
        *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_int),
        *(ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64),
    ]
    return library


class EmulatedDevice:
    """A :class:`~spatial_mamba_d2.ops.cuda.kernels.Device` for tensors on the CPU."""

    multiprocessors = 4
    shared_bytes = 227 * 1024
    #: called before every launch: (C++ name, blocks, warps, shared bytes, members)
    observer: Callable[..., None] | None = None

    def __init__(self, device: torch.device):
        self.library = load()

    def load(self, text: str, names: Sequence[str], title: str) -> list[Launch]:
        return [partial(self._launch, name) for name in names]

    def _launch(
        self, name: str, blocks: int, warps: int, shared_bytes: int, *members: Tensor | int
    ) -> None:
        if EmulatedDevice.observer:
            EmulatedDevice.observer(name, blocks, warps, shared_bytes, members)
        argument = pack(name, blocks, members)
        error = self.library.emulator_launch(
            name.encode(), blocks, warps, shared_bytes, argument, len(argument)
        )
        if error:
            raise RuntimeError(error.decode())


class Recording:
    """All launches within the context, to run them again without Python; see ``recording.h``.

    Buffers are the storages of tensors. What they contain when a launch first gets them is part of
    the recording: later launches must find in them what earlier ones have left.
    """

    def __enter__(self) -> Recording:
        self.launches: list[bytes] = []
        self.buffers: dict[int, tuple[int, bytes, Tensor]] = {}  # the tensors stay alive
        EmulatedDevice.observer = self._observe
        return self

    def __exit__(self, *error: object) -> None:
        EmulatedDevice.observer = None

    def _observe(
        self,
        name: str,
        blocks: int,
        warps: int,
        shared_bytes: int,
        members: tuple[Tensor | int, ...],
    ) -> None:
        numbers = [blocks, warps, shared_bytes, len(members)]
        for member in members:
            numbers += (-1, member) if isinstance(member, int) else self._place(member)
        self.launches.append(_text(name.encode()) + struct.pack(f"{len(numbers)}q", *numbers))

    def _place(self, x: Tensor) -> tuple[int, int]:
        """The number of the tensor's buffer, and where in it the tensor begins."""
        storage = x.untyped_storage()
        address = storage.data_ptr()
        if address not in self.buffers:
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
            self.buffers[address] = (len(self.buffers), content, x)
        return self.buffers[address][0], x.data_ptr() - address

    def write(self, path: Path) -> Path:
        contents = [_text(content) for _, content, _ in self.buffers.values()]
        sections = (contents, self.launches)
        path.write_bytes(b"".join(struct.pack("q", len(x)) + b"".join(x) for x in sections))
        return path


def _text(value: bytes) -> bytes:
    return struct.pack("q", len(value)) + value


@contextmanager
def emulated_cuda(order: str = "forward") -> Iterator[None]:
    """Run the operators on the CPU by the emulated CUDA kernels within the context."""
    load().emulator_set_order(ORDERS.index(order))
    kernels.OPENERS["cpu"] = EmulatedDevice
    override = torch.library.Library("spatial_mamba", "IMPL")
    for name, kernel in _extension.CUDA_KERNELS.items():
        override.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()
        del kernels.OPENERS["cpu"]
        load().emulator_set_order(0)
