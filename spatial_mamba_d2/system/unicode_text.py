"""Text as editors of all systems save it."""

from __future__ import annotations

import codecs


def decode_unicode(content: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one.

    Raises:
        UnicodeDecodeError: it is in another encoding.
    """
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf_16 else "utf-8-sig")
