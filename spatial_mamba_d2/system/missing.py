"""The error for a file or folder that does not exist."""

from __future__ import annotations

import os
from pathlib import Path


def no_such(
    what: str, path: str | os.PathLike[str], kind: str = "file", hint: str = ""
) -> FileNotFoundError:
    """The error that names ``path`` in full, because a relative one depends on where a tool runs.

    Args:
        what: which argument or key it comes from, such as ``DATASETS.CLASSES``.
        kind: what is expected there: file, folder, ``file or folder``.
        hint: where to read on, in brackets.
    """
    hint = f" ({hint})" if hint else ""
    return FileNotFoundError(f"{what}: no such {kind}: {Path(path).absolute()}{hint}")
