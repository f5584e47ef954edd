"""Headers of TIFF files: what Pillow and OpenCV do not tell about the pixels, or tell wrongly."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian; + is BigTIFF
GREY_INVERTED, GREY, RGB, PALETTE, CMYK, YCBCR, LAB = (
    0,
    1,
    2,
    3,
    5,
    6,
    8,
)  # PhotometricInterpretation
_COLORS = {GREY_INVERTED: 1, GREY: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, LAB: 3}
_ALPHA = (1, 2)  # of ExtraSamples: multiplied with the colours, and not
_KINDS = {1: "uint", 2: "int", 3: "float"}  # SampleFormat

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _BANDS = 256, 257, 258, 262, 274, 277
_EXTRA, _FORMAT, _SUBFILE, _PLANAR, _COMPRESSION = 338, 339, 254, 284, 259
_UNUSED = 65000  # a private tag, which readers pass over
_SHORT = 3
_TYPES = {1: "B", _SHORT: "H", 4: "I", 16: "Q"}  # of integer fields
_MOST_VALUES = 1024  # read of one field
_MOST_PAGES, _MOST_FIELDS = 100, 1000  # looked at: a file can claim any number


@dataclass(frozen=True)
class TiffHeader:
    """What the first image of a TIFF file is.

    Attributes:
        height, width: as stored.
        orientation: as in EXIF; 5 to 8 exchange height and width.
        bits: of a value.
        kind: of a value: ``"uint"``, ``"int"`` or ``"float"``.
        bands: values of a pixel.
        photometric: what the bands are, such as :data:`RGB`.
        extra: the meaning of each band after the colours that is stated: 0 unknown, 1 and 2 alpha.
        is_planar: whether its bands are stored one after the other.
        is_compressed: whether its pixels are.
        num_images: of this size.
        places: tag -> position of the field in the file.
        count_code: how the header's fields count their values, for :mod:`struct`.
    """

    height: int
    width: int
    orientation: int
    bits: int
    kind: str
    bands: int
    photometric: int
    extra: tuple[int, ...]
    is_planar: bool
    is_compressed: bool
    num_images: int
    places: dict[int, int]
    count_code: str

    @property
    def has_alpha(self) -> bool:
        return self.bands == self.colors + 1 and self.extra[:1] in {(kind,) for kind in _ALPHA}

    @property
    def colors(self) -> int:
        """How many bands the photometric interpretation needs."""
        return _COLORS.get(self.photometric, 0)

    def as_plain_bands(self, content: bytes) -> bytes:
        """The file with a header that lets OpenCV read its bands as they are stored.

        OpenCV turns some orientations and fails for the others, drops bands after the first one of
        a grey image, and multiplies colours with alpha. Before version 5 it has no integers of 32
        bits without sign: they are declared as signed, of the same bits.
        """
        changed = bytearray(content)
        fields = {_ORIENTATION: (_ORIENTATION, 1), _EXTRA: (_EXTRA, 0)}  # tag -> new tag, value
        if (self.bits, self.kind) == (32, "uint"):
            fields[_FORMAT] = _FORMAT, 2
        if self.bands > 2 and self.photometric in (GREY, GREY_INVERTED):
            fields[_PHOTOMETRIC] = _PHOTOMETRIC, RGB
            if self.bands == 3:  # OpenCV must find no other band
                fields[_EXTRA] = _UNUSED, 0
        for tag, (new_tag, value) in fields.items():
            if tag in self.places:
                padding = struct.calcsize(self.count_code) - 2
                code = f"{self.count_code[0]}HH{self.count_code[1]}H{padding}x"
                struct.pack_into(code, changed, self.places[tag], new_tag, _SHORT, 1, value)
        return bytes(changed)


def read_tiff_header(file: BinaryIO) -> TiffHeader:
    """The header of a file that begins with one of :data:`MARKS`.

    Raises:
        ValueError: it is cut off, or no TIFF.
    """
    file.seek(0)
    mark = file.read(4)
    order = "<" if mark.startswith(b"II") else ">"
    big = mark[2:] in (b"+\0", b"\0+")
    try:
        if big:
            file.seek(8)
        (next_page,) = _unpack(file, f"{order}{'Q' if big else 'I'}")
        values, places, next_page = _read_page(file, next_page, order, big)
        height, width = values[_HEIGHT][0], values[_WIDTH][0]
        num_images, num_pages = 1, 1
        while next_page and num_pages < _MOST_PAGES:
            page, _, next_page = _read_page(file, next_page, order, big)
            num_pages += 1
            is_reduced_or_mask = page.get(_SUBFILE, (0,))[0] & 5
            same_size = (page.get(_HEIGHT), page.get(_WIDTH)) == ((height,), (width,))
            num_images += same_size and not is_reduced_or_mask
        formats = set(values.get(_FORMAT, (1,)))
        bits = set(values.get(_BITS, (1,)))
        photometric = values.get(_PHOTOMETRIC, (GREY,))[0]
    except (struct.error, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"TIFF header is damaged or cut off: {error!r}") from error
    if len(formats) > 1 or len(bits) > 1:
        raise ValueError(
            f"bands of different types: bits {sorted(bits)}, formats {sorted(formats)}"
        )
    return TiffHeader(
        height,
        width,
        values.get(_ORIENTATION, (1,))[0],
        bits.pop(),
        _KINDS.get(formats.pop(), "uint"),  # 4 is "undefined"
        values.get(_BANDS, (1,))[0],
        photometric,
        values.get(_EXTRA, ()),
        values.get(_PLANAR, (1,))[0] == 2,
        values.get(_COMPRESSION, (1,))[0] != 1,
        num_images,
        places,
        f"{order}{'Q' if big else 'I'}",
    )


def _read_page(
    file: BinaryIO, start: int, order: str, big: bool
) -> tuple[dict[int, tuple[int, ...]], dict[int, int], int]:
    """Integer fields of the page at ``start``, their positions, and the next page."""
    file.seek(start)
    (num_fields,) = _unpack(file, f"{order}{'Q' if big else 'H'}")
    count_code, inline, entry_bytes = ("Q", 8, 20) if big else ("I", 4, 12)
    values: dict[int, tuple[int, ...]] = {}
    places: dict[int, int] = {}
    first = file.tell()
    for index in range(min(num_fields, _MOST_FIELDS)):
        file.seek(first + index * entry_bytes)
        tag, kind, count = _unpack(file, f"{order}HH{count_code}")
        if kind not in _TYPES or not 1 <= count <= _MOST_VALUES:
            continue
        code = f"{order}{count}{_TYPES[kind]}"
        if struct.calcsize(code) > inline:
            (position,) = _unpack(file, f"{order}{count_code}")
            file.seek(position)
        values[tag] = _unpack(file, code)
        places[tag] = first + index * entry_bytes
    file.seek(first + num_fields * entry_bytes)
    (next_page,) = _unpack(file, f"{order}{count_code}")
    return values, places, next_page


def _unpack(file: BinaryIO, code: str) -> tuple[int, ...]:
    return struct.unpack(code, file.read(struct.calcsize(code)))
