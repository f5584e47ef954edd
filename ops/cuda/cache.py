"""Compiled kernels on disk, so that a process compiles only what no other has compiled before.

The folder is ``cuda`` in ``SMD2_CACHE``, by default in ``spatial_mamba_d2`` in the user's folder
for caches. It may be on a disk that several machines share. Files are keyed by everything that goes
into them and are never changed, and the folder can be deleted at any time. If it cannot be written,
every process compiles what it needs, in a few seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spatial_mamba_d2.ops.cuda import nvrtc

logger = logging.getLogger(__name__)


def folder() -> Path | None:
    """Where compiled kernels are kept; ``None`` if there is no such place."""
    # The rule of system/once.py, which operators do not import.
    if chosen := os.environ.get("SMD2_CACHE"):
        return Path(chosen).expanduser() / "cuda"
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return Path(base, "spatial_mamba_d2/cuda")


def check_writable() -> Path:
    """The folder.

    Raises:
        OSError: there is none, or it cannot be written.
    """
    place = folder()
    if place is None:
        raise OSError("no folder for compiled kernels, because the user has none: set SMD2_CACHE")
    place.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=place).close()
    return place


def compiled(text: str, names: Sequence[str], architecture: int, title: str) -> nvrtc.Image:
    """:func:`~.nvrtc.compile_kernels`, from the cache if possible; from there without a log."""
    key = [text, names, architecture, nvrtc.OPTIONS, nvrtc.version()]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    place = folder()
    path = place and place / f"{title.replace('/', '-')}-sm_{architecture}-{digest[:32]}"
    if path and (image := _read(path)):
        return image
    logger.info("compiling %s for sm_%d", title, architecture)
    image = nvrtc.compile_kernels(text, names, architecture, title=title)
    if path:
        try:
            _write(path, image)
        except OSError as error:
            logger.debug("%s cannot be written: %s", path, error)
    return image


def _read(path: Path) -> nvrtc.Image | None:
    """What :func:`_write` wrote, unless it is missing or damaged."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        record = json.loads(head)
        if record["sha256"] == hashlib.sha256(code).hexdigest():
            return nvrtc.Image(code, record["symbols"], "")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(path: Path, image: nvrtc.Image) -> None:
    """Write a file that is complete at any time; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"sha256": hashlib.sha256(image.code).hexdigest(), "symbols": image.symbols}
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps(record).encode() + b"\n" + image.code)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
