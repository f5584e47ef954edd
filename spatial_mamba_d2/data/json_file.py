"""JSON files: the one way in which they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.faults import InaccessibleFileError


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; its encoding is UTF-8, UTF-16 or UTF-32, with or without a mark.

    ``NaN`` and ``Infinity``, which are no JSON but are often written, become floats: whoever uses a
    number checks that it is finite.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no JSON, cut off, in another encoding, nested too deeply, or larger than
            the memory; :class:`~.faults.InaccessibleFileError`: the system cannot read it.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {Path(path).absolute()}") from None
    except OSError as error:
        raise InaccessibleFileError(f"file {path} cannot be read: {error}") from error
    except MemoryError:
        raise ValueError(f"{path}: JSON that does not fit into the memory") from None
    if not content.strip():
        raise ValueError(f"{path}: not JSON, or cut off: the file is empty")
    try:
        return json.loads(content.decode(json.detect_encoding(content)))
    except UnicodeDecodeError as error:
        reason = f"not in UTF-8 or UTF-16: {error}{_hint(content)}"
        raise ValueError(f"{path}: not JSON, or cut off: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, or cut off: {error}{_hint(content)}") from error
    except RecursionError:
        raise ValueError(f"{path}: JSON that is nested too deeply") from None
    except MemoryError:
        raise ValueError(f"{path}: JSON that does not fit into the memory") from None


def _hint(content: bytes) -> str:
    """What a file that is not JSON probably is."""
    beginning = content[:64].lstrip().lower()
    if beginning.startswith(b"version https://git-lfs"):
        return " (a Git LFS pointer: run `git lfs pull`)"
    if beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        return " (a web page or XML)"
    if beginning.startswith((b"pk", b"\x1f\x8b")):
        return " (a compressed file: unpack it)"
    return ""
