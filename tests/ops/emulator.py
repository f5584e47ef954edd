"""The CUDA kernels, their launchers and their glue, built for the CPU by a plain C++ compiler.

Object files and programs are cached in ``build/cuda_emulator`` under a hash of all their inputs, so
a second run of the tests builds nothing.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import spatial_mamba_d2.ops  # noqa: F401  defines the schemas

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests/cuda_emulator"
KERNELS = tuple(sorted(ROOT.glob("ops/*/cuda.cu")))
GLUE = tuple(sorted(ROOT.glob("ops/*/cuda_glue.cpp")))
HEADERS = tuple(
    sorted([*ROOT.glob("ops/**/*.h"), *ROOT.glob("ops/**/*.cuh"), *EMULATOR.glob("*.h")])
)
OPERATORS = tuple(
    name
    for folder in (path.parent.name for path in GLUE)
    for name in (folder, f"{folder}_backward")
)
ORDERS = ("forward", "reverse", "random")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # #pragma unroll is nvcc's


_DEFINITIONS = torch.library.Library("spatial_mamba_emulated", "FRAGMENT")


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
    digest = hashlib.sha256("\0".join([*command, torch.__version__]).encode())
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


def compile_object(source: Path, *flags: str) -> Path:
    """``source`` compiled for the emulator."""
    command = [
        *compiler().split(),
        *("-std=c++20", "-fPIC", "-DSMD2_EMULATED", *WARNINGS, *flags),
        f"-I{EMULATOR}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        *("-x", "c++", "-c", str(source)),
    ]
    return _make(command, [source, *HEADERS], ".o")


def compile_all(sources: Sequence[Path], *flags: str) -> list[Path]:
    """:func:`compile_object` of each, in parallel."""
    compiler()  # skips in this thread
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: compile_object(source, *flags), sources))


def link(objects: Sequence[Path], *flags: str, suffix: str = "") -> Path:
    """A program linked from these objects, or a library if ``-shared`` is among the flags."""
    command = [*compiler().split(), *map(str, objects), *flags]
    return _make(command, objects, suffix)


@cache
def load() -> None:
    """Register ``torch.ops.spatial_mamba_emulated`` on the CPU."""
    sources = (*GLUE, *KERNELS, EMULATOR / "library.cpp", EMULATOR / "simt_emulator.cpp")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    objects = compile_all(sources, "-O1", abi)
    paths = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}",)]
    library = link(objects, "-shared", *paths, "-ltorch_cpu", "-lc10", suffix=".so")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.spatial_mamba, name).default._schema)
        _DEFINITIONS.define(schema.removeprefix("spatial_mamba::"))
    torch.ops.load_library(library)


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Run the operators on the CPU by the emulated CUDA kernels within the context."""
    load()
    override = torch.library.Library("spatial_mamba", "IMPL")
    for name in OPERATORS:
        kernel = getattr(torch.ops.spatial_mamba_emulated, name)
        override.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()
