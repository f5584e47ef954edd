"""Results that are computed once per machine, and remembered as long as files are unchanged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from spatial_mamba_d2.system.atomic import replacing

logger = logging.getLogger(__name__)

# A file that has just been written may change again without a new time: file systems count in
# milliseconds, some in seconds.
RACY_NS = 2 * 10**9


def cache_folder() -> Path:
    """``SMD2_CACHE``, or ``spatial_mamba_d2`` in the user's folder for caches."""
    if chosen := os.environ.get("SMD2_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "spatial_mamba_d2")


def once_per_machine(
    name: str,
    files: Iterable[str | Path],
    parameters: Any,
    compute: Callable[[], Any],
    *,
    keep: Callable[[Any], bool],
) -> Any:
    """What ``compute()`` returns, from the cache if nothing that it depends on has changed.

    Of several processes that ask at once, one computes and the others wait for its result. If the
    cache folder is not writable, or a file is missing or was changed in the last two seconds, every
    process computes.

    Args:
        name: of the computation; part of the file name in the cache.
        files: what the result depends on; each is identified by path, size and times of change.
        parameters: what else it depends on, including a version of the computation, as JSON.
        compute: its result must be JSON.
        keep: whether a result is to be remembered.
    """
    digest = hashlib.sha256(json.dumps(parameters).encode())
    newest_ns = 0
    try:
        for file in files:
            status = os.stat(file)
            newest_ns = max(newest_ns, status.st_mtime_ns)
            times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
            digest.update(f"{file}\0{status.st_size}\0{times}\0".encode())
        if newest_ns > time.time_ns() - RACY_NS:
            return compute()
        path = cache_folder() / f"{name}-{digest.hexdigest()[:32]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except (OSError, RuntimeError) as error:
        logger.debug("%s is not remembered: %s", name, error)
        return compute()
    try:
        return _remembered(path, compute, keep)
    finally:
        lock.release()


def _remembered(path: Path, compute: Callable[[], Any], keep: Callable[[Any], bool]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or damaged
        result = compute()
    if keep(result):
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(result), encoding="utf-8")
        except OSError as error:
            logger.debug("%s cannot be written: %s", path, error)
    return result
