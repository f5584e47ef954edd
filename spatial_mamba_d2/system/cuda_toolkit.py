"""Find the CUDA toolkit that the operators can be compiled with. Standard library only.

``setup.py`` compiles with the toolkit that this module finds, and the doctor reports it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: compute capabilities to compile for if the toolkit supports them; ``TORCH_CUDA_ARCH_LIST``
#: overrides the list
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

DEFAULT_HOME = Path("/usr/local/cuda")


class NoToolkitError(RuntimeError):
    """No suitable CUDA toolkit; the message says why."""


class Toolkit(NamedTuple):
    """A CUDA toolkit: its root folder, and its version such as "13.0"."""

    home: Path
    version: str


def _ask(*command: str | Path) -> str:
    """What a command prints to both streams, or "" if it cannot be run."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc:
        # This one may be a script that calls another nvcc, which knows its own root.
        for root in re.findall(
            r"^#\$ TOP=(.+)$", _ask(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M
        ):
            yield Path(root.strip().strip('"'))
        yield Path(nvcc).resolve().parents[1]
    yield DEFAULT_HOME


def _is_toolkit(home: Path) -> bool:
    headers = (home / "include/cuda_runtime.h", *home.glob("targets/*/include/cuda_runtime.h"))
    return (home / "bin/nvcc").exists() and any(header.exists() for header in headers)


def find_toolkit(torch_cuda: str | None) -> Toolkit:
    """Find the toolkit for a PyTorch built for CUDA ``torch_cuda`` (``torch.version.cuda``).

    It is the first folder with ``bin/nvcc`` and ``include/cuda_runtime.h`` among ``CUDA_HOME``,
    ``CUDA_PATH``, the root that the ``nvcc`` on PATH reports, and ``/usr/local/cuda``.

    Raises:
        NoToolkitError: No toolkit is found, or its major version differs from ``torch_cuda``.
    """
    if torch_cuda is None:
        raise NoToolkitError("PyTorch was built without CUDA")
    candidates = list(dict.fromkeys(Path(os.path.realpath(path)) for path in _candidates()))
    home = next(filter(_is_toolkit, candidates), None)
    if home is None:
        raise NoToolkitError(
            f"no CUDA toolkit: no bin/nvcc with include/cuda_runtime.h in any of "
            f"{', '.join(map(str, candidates))}; install CUDA {torch_cuda}, or set CUDA_HOME"
        )
    found = re.search(r"release (\d+\.\d+)", _ask(home / "bin/nvcc", "--version"))
    if not found:
        raise NoToolkitError(f"{home / 'bin/nvcc'} does not print its version")
    version = found[1]
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        raise NoToolkitError(
            f"the CUDA toolkit in {home} is {version}, but PyTorch was built for CUDA "
            f"{torch_cuda}: set CUDA_HOME to a toolkit with the same major version"
        )
    return Toolkit(home, version)


def architectures(toolkit: Toolkit) -> list[str]:
    """The members of :data:`ARCHITECTURES` that the toolkit supports."""
    known = re.findall(r"compute_(\d+)", _ask(toolkit.home / "bin/nvcc", "--list-gpu-arch"))
    return [name for name in ARCHITECTURES if name.replace(".", "") in known]


def architecture_flags(names: list[str]) -> list[str]:
    """nvcc's flags for machine code for each of these, and for PTX of the last for newer GPUs."""
    numbers = [name.replace(".", "") for name in names]
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]
