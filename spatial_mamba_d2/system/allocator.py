"""What the C library does with memory that is free again."""

from __future__ import annotations

import ctypes
import os
from typing import Any

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_SETTINGS_OF_THE_USER = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def _c_function(name: str) -> Any | None:
    return None if os.name == "nt" else getattr(ctypes.CDLL(None), name, None)


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed CPU tensors for the next ones.

    glibc hands large blocks back to the operating system at once, which then has to find, zero and
    map every page of them again for the next image: for large images that takes longer than the
    model. ``tools/benchmark.py`` shows both ways.

    It concerns the whole process and its forks, and cannot be taken back; the process stays as
    large as it once was. That is why only our tools call it, and no module does on import.

    Returns:
        whether there is something to keep: ``False`` where the C library is not glibc, or where
        the user has set the allocator up by environment variables, which then stand.
    """
    if any(name in os.environ for name in _SETTINGS_OF_THE_USER):
        return False
    mallopt = _c_function("mallopt")
    if mallopt is None:
        return False
    never = -1
    return bool(mallopt(_M_TRIM_THRESHOLD, never) and mallopt(_M_MMAP_MAX, 0))


def release_freed_memory() -> None:
    """Give all freed memory back to the operating system, once; does nothing without glibc."""
    if trim := _c_function("malloc_trim"):
        trim(ctypes.c_size_t(0))
