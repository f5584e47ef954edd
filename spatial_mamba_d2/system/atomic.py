"""Files and folders that are either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What C++ writers report when the file system has refused a write; they name no reason.
_WRITER_FAULTS = ("inline_container", "PytorchStreamWriter", "unexpected pos", "iostream")


@contextmanager
def replacing(
    path: str | Path, num_bytes: int | None = None, *, by_several: bool = False
) -> Iterator[Path]:
    """Yield a temporary file to write, which replaces ``path`` at the end, once it is on disk.

    If that fails, the temporary file is removed and what was at ``path`` before is unchanged.

    Args:
        path: the file.
        num_bytes: size that it will have, about, for the message if there is no room.
        by_several: whether other processes may write the same file now. What a killed one leaves is
            not written over then.

    Raises:
        OSError: it cannot be written; names the file, the reason, and the bytes needed and free.
    """
    path = Path(path)
    # The machine's name, because several may share the folder. What a killed process leaves is
    # written over by the next one.
    owner = f"{platform.node()}.{os.getpid()}" if by_several else platform.node()
    temporary = path.with_name(f".{path.name}.{owner}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        reason = _refusal(error, temporary)
        with contextlib.suppress(OSError):
            num_bytes = max(num_bytes or 0, temporary.stat().st_size)
            temporary.unlink()
        if reason is None:
            raise
        text = _explain(path, reason, num_bytes)
        text += "; the earlier file is unchanged" if path.exists() else ""
        raise type(reason)(reason.errno, text) from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """For writing to a file that is open or is appended to.

    Raises:
        OSError: as from :func:`replacing`, if the file system refuses.
    """
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, _explain(Path(path), error, None)) from error


def _refusal(error: BaseException, temporary: Path) -> OSError | None:
    """The file system's reason for ``error``, if it has one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _WRITER_FAULTS):
        try:  # where it was refused it will be again
            with temporary.open("ab") as file:
                file.write(bytes(1 << 20))
                file.flush()
                os.fsync(file.fileno())
        except OSError as again:
            return again
        return OSError(errno.EIO, str(error).split("\n", 1)[0])
    return None


def _explain(path: Path, reason: OSError, num_bytes: int | None) -> str:
    text = f"{path} cannot be written: {reason.strerror}"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        limit = _file_size_limit()
        needed = f"it needs at least {num_bytes:,} bytes, " if num_bytes else ""
        text += f"; {needed}{free:,} bytes are free in {path.parent.absolute()}"
        if limit is not None:
            text += f", and a file may have {limit:,} bytes (ulimit -f)"
    return text


def _file_size_limit() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


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
