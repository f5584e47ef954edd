"""The kernels' sources as one text for the compiler, and the constants in them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

OPS = Path(__file__).parents[1]


@cache
def bundle(name: str) -> str:
    """A source, with the quoted includes in place, each once; NVRTC then needs no files.

    Args:
        name: path in ``ops/``, such as ``"state_fusion/fusion.cuh"``.
    """
    text = _with_includes(OPS / name, set())
    # Kernels are named as the operators' sources name them.
    return f"{text}\nusing namespace smd2::cuda;\n"


def _with_includes(path: Path, seen: set[Path]) -> str:
    path = path.resolve()
    if path in seen:
        return ""
    seen.add(path)
    shown = path.relative_to(OPS.resolve()).as_posix()  # in the compiler's messages
    lines = [f'#line 1 "{shown}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if match := re.match(r'#include "(.+)"', line):
            lines += [_with_includes(path.parent / match[1], seen), f'#line {number + 1} "{shown}"']
        else:
            lines.append("" if line.startswith("#pragma once") else line)
    return "\n".join(lines)


@cache
def constants(name: str) -> dict[str, int]:
    """The values of ``constexpr int`` in one file: ``"kLanes"``, ``"TileShape<double>.kRows"``."""
    text = (OPS / name).read_text(encoding="utf-8")
    found = {}
    for struct, body in re.findall(r"^struct (\S+) \{\n(.*?)^\};", text, re.S | re.M):
        for constant, value in re.findall(r"constexpr int (k\w+) = (\d+);", body):
            found[f"{struct}.{constant}"] = int(value)
    for constant, value in re.findall(r"^constexpr int (k\w+) = (\d+);", text, re.M):
        found[constant] = int(value)
    return found
