"""Files and folders that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` at the end, once it is on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    yield temporary
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def new_folder(root: str | Path) -> Iterator[Path]:
    """A folder to fill that becomes ``root`` at the end, if that is not there by then, or empty.

    An interrupted process may leave a hidden folder ``.NAME-*`` beside it.
    """
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as workspace:
        tree = Path(workspace, root.name)  # a child, for the workspace itself is private
        tree.mkdir()
        yield tree
        if root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        if not root.exists():  # another process may have been faster
            os.replace(tree, root)
