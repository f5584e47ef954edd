"""Arrays of 8 and 16 bits, and a writer of TIFF that stores them in every way."""

from __future__ import annotations

import struct

import numpy as np

RNG = np.random.default_rng(0)
EIGHT = RNG.integers(0, 256, (5, 7, 6), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (5, 7, 6), dtype=np.uint16)


def write_tiff(
    path, *pages, photometric=None, extra=None, order="<", planar=False, tags=(), big=False
):
    """Uncompressed TIFF of arrays ``[H, W, C]`` of any type, one for each page.

    Args:
        photometric, extra: PhotometricInterpretation and ExtraSamples.
        order: ``"<"`` or ``">"``.
        planar: one band after the other.
        tags: further single numbers by tag.
        big: BigTIFF.
    """
    offset, inline = ("Q", 8) if big else ("I", 4)
    mark = b"II" if order == "<" else b"MM"
    if big:
        out = bytearray(mark + struct.pack(f"{order}HHHQ", 43, 8, 0, 16))
    else:
        out = bytearray(mark + struct.pack(f"{order}HI", 42, 8))
    for number, page in enumerate(pages):
        page = page[..., None] if page.ndim == 2 else page
        height, width, bands = page.shape
        stored = page.transpose(2, 0, 1) if planar else page
        data = stored.astype(page.dtype.newbyteorder(order)).tobytes()
        num_strips = bands if planar else 1
        strip = len(data) // num_strips
        default = 2 if bands >= 3 else 1
        fields = {
            256: [width],
            257: [height],
            258: [page.dtype.itemsize * 8] * bands,
            259: [1],
            262: [default if photometric is None else photometric],
            277: [bands],
            278: [height],
            279: [strip] * num_strips,
            284: [2 if planar else 1],
            339: [{"u": 1, "i": 2, "f": 3}[page.dtype.kind]] * bands,
            **{tag: [value] for tag, value in dict(tags).items()},
        }
        if extra is not None:
            fields[338] = list(extra)
        num_fields = len(fields) + 1
        entry = 4 + 2 * inline
        start = len(out) + (8 if big else 2) + entry * num_fields + inline
        body = bytearray(data + b"\0" * (len(data) % 8))
        fields[273] = [start + i * strip for i in range(num_strips)]
        head = bytearray(struct.pack(f"{order}{'Q' if big else 'H'}", num_fields))
        for tag, values in sorted(fields.items()):
            is_long = tag in (256, 257, 273, 278, 279)
            code = f"{order}{len(values)}{'I' if is_long else 'H'}"
            content = struct.pack(code, *values)
            head += struct.pack(f"{order}HH{offset}", tag, 4 if is_long else 3, len(values))
            if len(content) > inline:
                head += struct.pack(f"{order}{offset}", start + len(body))
                body += content + b"\0" * (-len(content) % 8)
            else:
                head += content.ljust(inline, b"\0")
        following = start + len(body) if number + 1 < len(pages) else 0
        out += head + struct.pack(f"{order}{offset}", following) + body
    path.write_bytes(out)
    return path


def scaled(values, low=0, high=65535):
    return np.rint((np.clip(values, low, high).astype(float) - low) * 255 / (high - low))
