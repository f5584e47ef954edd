"""Text files that people write by hand: names of classes, lists of images, label maps."""

from __future__ import annotations

from pathlib import Path

from spatial_mamba_d2.system.missing import no_such
from spatial_mamba_d2.system.unicode_text import decode_unicode


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
        raise no_such(key, path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{key}: file {path} cannot be read: {error}") from error
    try:
        return decode_unicode(content)
    except UnicodeDecodeError as error:
        utf_16 = error.encoding.lower().startswith("utf-16")
        encoding = "UTF-16, as its byte order mark says" if utf_16 else "UTF-8"
        raise ValueError(f"{key}: file {path} must be in {encoding}: {error}") from None
