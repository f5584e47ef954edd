"""What processor this is, and which of its instructions matter for speed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_CPUINFO = Path("/proc/cpuinfo")
#: what is reported -> names of it by PyTorch and by Linux, any of which suffices
_ABILITIES = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512_f", "avx512f"},
    "SVE": {"sve"},
    "bfloat16": {"avx512_bf16", "bf16"},
    "float16": {"avx512_fp16", "fp16_arith", "asimdhp"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "i8mm": {"i8mm"},
    "AMX": {"amx_tile"},
    "AMX bfloat16": {"amx_bf16"},
    "AMX int8": {"amx_int8"},
}


def describe_processor() -> dict[str, Any]:
    """Name, abilities, PyTorch's threads, and the instructions that PyTorch's kernels use.

    Returns:
        ``{"processor": "...", "abilities": ["AVX2", "AVX-512", "bfloat16", ...], "threads": 2,
        "capability": "AVX512"}``. ``abilities`` is empty where neither PyTorch, whose older
        versions do not tell, nor Linux names any.
    """
    known = _flags()
    return {
        "processor": _name(),
        "abilities": [name for name, flags in _ABILITIES.items() if flags & known],
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def in_words(machine: Mapping[str, Any]) -> str:
    """One line of :func:`describe_processor`'s result, which may be part of a larger one."""
    abilities = f" ({', '.join(machine['abilities'])})" if machine["abilities"] else ""
    return (
        f"{machine['processor']}{abilities}, {machine['threads']} threads, "
        f"{machine['capability']} kernels of PyTorch"
    )


def _name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> set[str]:
    if read := getattr(torch.cpu, "get_capabilities", None):
        return {name for name, value in read().items() if value is True}
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(key: str) -> str:
    """The first value of ``key``, or "" if Linux gives none."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.is_file() else []
    values = (line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key)
    return next(values, "")
