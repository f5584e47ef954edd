"""Text files that people write by hand: names of classes, lists of images, label maps."""

from __future__ import annotations

import codecs
from pathlib import Path


def read_text_file(path: str | Path, key: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Args:
        key: the configuration key that names the file, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is in another encoding, or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no such file: {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{key}: file {path} cannot be read: {error}") from error
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16, as its byte order mark says" if utf_16 else "UTF-8"
        raise ValueError(f"{key}: file {path} must be in {encoding}: {error}") from None
