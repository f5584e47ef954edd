"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import os
from typing import Any

# Parameters of mallopt() in glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_USER_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def _c_function(name: str) -> Any | None:
    return None if os.name == "nt" else getattr(ctypes.CDLL(None), name, None)


def keep_freed_memory() -> bool:
    """Keep the memory of freed CPU tensors in this process, and reuse it for new ones.

    By default glibc returns large blocks to the operating system at once, which then has to find,
    zero and map every page again for the next image. For large images that takes longer than the
    model itself; ``tools/benchmark.py`` measures both settings.

    The setting affects the entire process and its forks and cannot be undone, and the process never
    shrinks. Therefore only our tools call this function; no module does so on import.

    Returns:
        Whether the setting was made. ``False`` if the C library is not glibc, or if the user has
        configured the allocator by environment variables, which take precedence.
    """
    if any(name in os.environ for name in _USER_SETTINGS):
        return False
    mallopt = _c_function("mallopt")
    if mallopt is None:
        return False
    never = -1
    return bool(mallopt(_M_TRIM_THRESHOLD, never) and mallopt(_M_MMAP_MAX, 0))


def release_freed_memory() -> None:
    """Return all freed memory to the operating system, once; does nothing without glibc."""
    if trim := _c_function("malloc_trim"):
        trim(ctypes.c_size_t(0))
