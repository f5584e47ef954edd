"""Names of result files: one for each input, and never a file that somebody still needs."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

MAX_NAMED = 5  # files that an error lists


def common_folder(paths: Sequence[Path]) -> Path:
    """The folder that the names of results start from: a single folder, or what is above all.

    Args:
        paths: files and folders.
    """
    folders = [p if p.is_dir() and len(paths) == 1 else p.parent for p in map(_absolute, paths)]
    folders += [p for p in map(_absolute, paths) if p.is_dir()]
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # on several drives
        return folders[0]


def name_outputs(
    files: Sequence[Path], root: Path, output: Path, endings: Sequence[str]
) -> list[Path]:
    """``OUTPUT/NAME`` of the results of each file, to which ``endings`` are appended.

    The tree below ``root`` stays: ``root/a/x.jpg`` becomes ``OUTPUT/a/x``. Files of which a result
    would have the name of another one's keep their suffix: ``x.jpg`` next to ``x.png`` become
    ``x.jpg`` and ``x.png``. Capitals count as small letters, because some file systems do so:
    ``x.jpg`` and ``X.JPG`` become ``x.jpg`` and ``X.JPG-2``.
    """
    relative = [below(file, root) for file in files]
    stems = [path.with_suffix("") for path in relative]
    names, number = stems.copy(), 1
    while True:
        counts = Counter(_key(f"{name}{ending}") for name in names for ending in endings)
        clashing = {
            index
            for index, name in enumerate(names)
            if any(counts[_key(f"{name}{ending}")] > 1 for ending in endings)
        }
        if not clashing:
            return [output / name for name in names]
        if changed := [index for index in clashing if names[index] == stems[index]]:
            for index in changed:
                names[index] = relative[index]
        else:
            number += 1
            last = max(clashing)
            names[last] = relative[last].with_name(f"{relative[last].name}-{number}")


def below(file: Path, *roots: Path) -> Path:
    """The path of ``file`` from the first of ``roots`` that it is below, or from the top."""
    file = _absolute(file)
    for root in map(_absolute, roots):
        if file.is_relative_to(root):
            return file.relative_to(root)
    return file.relative_to(file.anchor)


def check_outputs(
    outputs: Iterable[Path], inputs: Iterable[Path], *, overwrite: bool = False
) -> None:
    """Refuse to write over files, before anything is computed.

    Args:
        outputs: files that will be written.
        inputs: files that are read, which are never written over, however their paths are spelled.
        overwrite: write over other files that exist.

    Raises:
        ValueError: an output is an input, or exists and ``overwrite`` is False; or its folder is
            a file, or cannot be written.
    """
    outputs = list(outputs)
    needed = {identity: file for file in inputs if (identity := _identity(file))}
    existing = []
    for output in outputs:
        if (identity := _identity(output)) in needed:
            raise ValueError(
                f"output: {output} would be written over the input {needed[identity]}; choose "
                "another folder or name"
            )
        if identity or output.is_symlink():
            existing.append(output)
    if existing and not overwrite:
        listed = "".join(f"\n  {path}" for path in existing[:MAX_NAMED])
        more = f"\n  and {len(existing) - MAX_NAMED} more" if len(existing) > MAX_NAMED else ""
        raise ValueError(
            f"output: {len(existing)} files exist already; choose another place, or replace them "
            f"with --overwrite{listed}{more}"
        )
    for folder in {output.parent for output in outputs}:
        there = next(path for path in (folder, *_absolute(folder).parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"output: {there} must be a folder, and is a file")
        if not os.access(there, os.W_OK):
            raise ValueError(f"output: the folder {there} cannot be written")


def same_folder(first: Path, second: Path) -> bool:
    """Whether both are one folder, however they are spelled."""
    return os.path.realpath(first) == os.path.realpath(second) or (
        first.is_dir() and second.is_dir() and os.path.samefile(first, second)
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # links stay: their names are what the user sees


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _identity(path: Path) -> tuple[int, int] | None:
    """What links to a file share with it; None if there is no such file."""
    for spelling in (path, os.path.abspath(path)):  # new/../x is there once new is made
        with suppress(OSError):
            status = os.stat(spelling)
            return status.st_dev, status.st_ino
    return None
