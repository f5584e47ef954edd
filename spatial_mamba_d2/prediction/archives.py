"""Images in tar files, which are read where they are, in any order."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from spatial_mamba_d2.data.images import is_image, naming_file

ARCHIVE_SUFFIXES = {".tar"}


def is_archive(path: Path) -> bool:
    """Whether it is a tar file by its name."""
    return path.suffix.lower() in ARCHIVE_SUFFIXES


@dataclass(frozen=True)
class Member:
    """An image in a tar file.

    Attributes:
        archive: the tar file.
        name: in it.
        offset, size: of its content, in bytes.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return str(self.archive / self.name)

    def open(self) -> BinaryIO:
        """Its content.

        Raises:
            ValueError: the archive is cut off.
        """
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"the archive is cut off, at {len(content)} of {self.size} bytes")
        return io.BytesIO(content)


def find_members(archive: Path) -> list[Member]:
    """The images in a tar file by their names, in its order; of equal names, the last one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no tar file, compressed or cut off, or a name leads out of it.
    """
    try:
        with naming_file("archive", archive), tarfile.open(archive, "r:") as file:
            entries = [entry for entry in file if entry.isreg() and not entry.issparse()]
    except tarfile.TarError as error:
        raise ValueError(
            f"archive file {archive} cannot be read as a tar file that is not compressed: {error}"
        ) from error
    members: dict[str, Member] = {}
    for entry in entries:
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"archive file {archive} must have names below it, got {entry.name!r}")
        if is_image(Path(path), Path()):
            members.pop(str(path), None)
            members[str(path)] = Member(archive, str(path), entry.offset_data, entry.size)
    if not members:
        raise ValueError(f"archive file {archive} must hold an image, got none")
    return list(members.values())
