"""The compile-time constants of the CUDA kernels, read from their sources; needs a checkout."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from spatial_mamba_d2 import ops

OPS = Path(ops.__file__).parent


@cache
def kernel_constants() -> dict[str, int]:
    """Values of ``constexpr int`` by name; those of ``TileShape`` as ``float.kRows`` and so on.

    Raises:
        FileNotFoundError: the installed package has no CUDA sources.
    """
    files = [*sorted(OPS.glob("*/*.h*")), *sorted(OPS.glob("*/*.cuh"))]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    if "struct TileShape" not in text:
        raise FileNotFoundError(f"{OPS} has no CUDA sources: run this in a checkout")
    found = {}
    shapes = re.findall(r"struct TileShape(?:<double>)? {(.*?)};", text, re.S)
    for scalar, body in zip(("float", "double"), shapes, strict=True):
        for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", body):
            found[f"{scalar}.{name}"] = int(value)
    for name, value in re.findall(r"^constexpr int (k\w+) = (\d+);", text, re.M):
        found[name] = int(value)
    return found
