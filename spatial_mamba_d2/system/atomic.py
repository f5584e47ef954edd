"""Files and folders that are either complete or absent."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file to write, which replaces ``path`` at the end, once it is on disk."""
    path = Path(path)
    # The machine's name, because several may share the folder. What a killed process leaves is
    # written over by the next one.
    temporary = path.with_name(f".{path.name}.{platform.node()}.part")
    yield temporary
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def new_folder(root: str | Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes ``root`` at the end unless that exists and has content.

    An interrupted process may leave a hidden folder ``.NAME-*`` next to it.
    """
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as workspace:
        tree = Path(workspace, root.name)  # a child, because only the owner may read the workspace
        tree.mkdir()
        yield tree
        if root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        if not root.exists():  # another process may have created it meanwhile
            os.replace(tree, root)
