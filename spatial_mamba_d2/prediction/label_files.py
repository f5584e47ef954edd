"""Label maps written row by row, so that no image has to fit into the memory."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index, index_dtype
from spatial_mamba_d2.prediction.sources import Georeference

_TILE_PX = 256
_CHUNK_BYTES = 1 << 20  # compressed data that one chunk of a PNG holds, about


class PngLabels:
    """A grey PNG file, of 8 bits, or of 16 for more than 255 classes.

    Args:
        path: the file.
        size: height and width.
        num_classes: of the label maps.
    """

    def __init__(self, path: Path, size: tuple[int, int], num_classes: int):
        self.file = path.open("wb")
        self.compressor = zlib.compressobj(6)
        self.pending = bytearray()
        height, width = size
        self.dtype = index_dtype(num_classes).newbyteorder(">")
        self.file.write(b"\x89PNG\r\n\x1a\n")
        num_bits = 8 * self.dtype.itemsize
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, num_bits, 0, 0, 0, 0))

    def write(self, rows: np.ndarray) -> None:
        """The next rows, ``[h, W]``."""
        content = rows.astype(self.dtype).view(np.uint8)
        filtered = np.zeros((len(rows), content.shape[1] + 1), np.uint8)  # filter 0: as it is
        filtered[:, 1:] = content
        self.pending += self.compressor.compress(filtered.tobytes())
        if len(self.pending) >= _CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.pending:
            self._chunk(b"IDAT", bytes(self.pending))
            self.pending.clear()

    def _chunk(self, kind: bytes, content: bytes) -> None:
        checksum = zlib.crc32(kind + content)
        self.file.write(struct.pack(">I", len(content)) + kind + content)
        self.file.write(struct.pack(">I", checksum))

    def __enter__(self) -> PngLabels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with self.file:
            if kind is None:
                self.pending += self.compressor.flush()
                self._flush()
                self._chunk(b"IEND", b"")


class GeoTiffLabels:
    """A tiled, compressed GeoTIFF file, by rasterio; what is no class is its nodata value.

    Args:
        path: the file.
        size: height and width.
        num_classes: of the label maps.
        georeference: where it lies, if that is known.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        num_classes: int,
        georeference: Georeference | None,
    ):
        import rasterio

        height, width = size
        place = {}
        if georeference is not None:
            transform = rasterio.Affine(*georeference.transform)
            place = {"crs": georeference.crs, "transform": transform}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            self.file = rasterio.open(
                path, "w", driver="GTiff", height=height, width=width, count=1,
                dtype=index_dtype(num_classes).name, nodata=ignore_index(num_classes),
                tiled=True, blockxsize=_TILE_PX, blockysize=_TILE_PX, compress="deflate",
                bigtiff="if_safer", **place,
            )  # fmt: skip
        self.pending = np.zeros((0, width), index_dtype(num_classes))
        self.num_written = 0

    def write(self, rows: np.ndarray) -> None:
        """The next rows, ``[h, W]``."""
        self.pending = np.concatenate([self.pending, rows])
        self._flush(len(self.pending) // _TILE_PX * _TILE_PX)  # each tile is written once

    def _flush(self, number: int) -> None:
        from rasterio.windows import Window

        if number:
            place = Window(0, self.num_written, self.pending.shape[1], number)
            self.file.write(self.pending[:number], 1, window=place)
            self.pending = self.pending[number:]
            self.num_written += number

    def __enter__(self) -> GeoTiffLabels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if kind is None:
            self._flush(len(self.pending))
        self.file.close()
