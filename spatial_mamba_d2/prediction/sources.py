"""Images to predict: how they are named on a command line, and read by windows."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spatial_mamba_d2.data.images import (
    SUFFIXES,
    StoredImage,
    find_images,
    naming_file,
    read_image,
    read_size,
)
from spatial_mamba_d2.data.pixels import RANGE_KEY, ImageFormatError, PixelRange, scale_to_8_bits
from spatial_mamba_d2.data.text_file import read_text_file
from spatial_mamba_d2.prediction.archives import ARCHIVE_SUFFIXES
from spatial_mamba_d2.prediction.streams import is_stream
from spatial_mamba_d2.prediction.videos import VIDEO_SUFFIXES
from spatial_mamba_d2.prediction.windows import Window
from spatial_mamba_d2.system.missing import no_such

LIST_SUFFIXES = {".txt", ".lst"}
_SUFFIXES = SUFFIXES | VIDEO_SUFFIXES | ARCHIVE_SUFFIXES
RASTER_SUFFIXES = {".tif", ".tiff", ".jp2", ".vrt"}
# of decoded blocks, unless GDAL_CACHEMAX says another number; GDAL takes 5 % of the memory
_CACHE_BYTES = 512 << 20


def find_sources(
    inputs: Sequence[str | Path], *, leave_out: Path | None = None, key: str = "input"
) -> list[Path]:
    """The images that words of a command line name, each once, in this order.

    A word is an image, a video or a tar file with images; a folder, with what is below it; a
    pattern such as ``photos/**/*.jpg``; or a file ``.txt`` or ``.lst`` with one of these a line,
    relative to the folder of the list.

    Args:
        leave_out: a folder that results are written to.
        key: what names them, for errors.

    Raises:
        FileNotFoundError: something does not exist, a pattern matches nothing, or there is no
            image.
        ValueError: a list is empty, or not UTF-8; or a word names a stream.
    """
    paths = [path for word in inputs for path in _expand(str(word), key)]
    return find_images(paths, leave_out=leave_out, key=key, suffixes=_SUFFIXES)


def _expand(word: str, key: str) -> Iterator[Path]:
    path = Path(word)
    if path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        lines = [line.strip() for line in read_text_file(path, key).splitlines()]
        names = [line for line in lines if line and not line.startswith("#")]
        if not names:
            raise ValueError(f"{key}: the list {path} must name at least one image, got none")
        for name in names:
            yield from _expand(str(path.parent / name), key)
    elif is_stream(word):
        raise ValueError(
            f"{key}: {word} is a stream or a camera, which is predicted alone: on the command line "
            "without other inputs, in Python by load_predictor(...)(address)"
        )
    elif path.exists() or path.is_symlink():
        yield path
    elif glob.has_magic(word):
        found = sorted(glob.glob(word, recursive=True))
        if not found:
            raise no_such(key, path, "file that matches the pattern")
        yield from map(Path, found)
    else:
        raise no_such(key, path, "file or folder")


@dataclass(frozen=True)
class Georeference:
    """Where a raster lies.

    Attributes:
        crs: name of the coordinate reference system, such as ``EPSG:32633``, or its WKT.
        transform: a, b, c, d, e, f: x = a * column + b * row + c, y = d * column + e * row + f,
            where (0, 0) is the corner of the first pixel.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Pixels (x, y), ``float64[N, 2]`` -> coordinates."""
        a, b, c, d, e, f = self.transform
        x, y = points[:, 0], points[:, 1]
        return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)


class Raster(Protocol):
    """An image that is read by windows."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""

    def read(self, window: Window) -> np.ndarray | None:
        """``uint8[h, w, C]``, or None if all of it is nodata.

        Raises:
            ValueError: it cannot be decoded.
        """


class ArrayRaster:
    """An array ``uint8[H, W, C]`` in memory, or mapped into it."""

    def __init__(self, image: np.ndarray):
        if image.ndim != 3 or image.dtype != np.uint8:
            raise ValueError(f"image must be uint8[H, W, C], got {image.dtype}{list(image.shape)}")
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]

    def read(self, window: Window) -> np.ndarray | None:
        return np.ascontiguousarray(self.image[window.slices])


class FileRaster:
    """An image file that is decoded as a whole, when its first window is read."""

    def __init__(self, path: Path | StoredImage, num_channels: int, value_range: PixelRange | None):
        self.size = read_size(path, num_channels, value_range)
        self._arguments = path, num_channels, value_range

    @cached_property
    def _image(self) -> np.ndarray | ValueError:
        try:
            return read_image(*self._arguments)
        except ValueError as error:
            return error  # for every window: to decode it again would fail again

    def read(self, window: Window) -> np.ndarray | None:
        if isinstance(self._image, ValueError):
            raise self._image
        return np.ascontiguousarray(self._image[window.slices])


class GeoRaster:
    """A file that rasterio reads by windows, so that memory does not grow with it."""

    def __init__(
        self,
        path: Path,
        num_channels: int,
        value_range: PixelRange | None,
        band_names: Sequence[str] = (),
    ):
        self.path, self.num_channels, self.value_range = path, num_channels, value_range
        self.band_names = band_names
        self._file = _open_dataset(path)
        self.size = self._file.height, self._file.width
        self._check()

    def _check(self) -> None:
        file, channels = self._file, self.num_channels
        colors = [i for i, c in enumerate(file.colorinterp, 1) if c.name != "alpha"]
        described = {name: i for i, name in enumerate(file.descriptions, 1) if name}
        if self.band_names and described:
            if missing := [name for name in self.band_names if name not in described]:
                raise ImageFormatError(
                    f"image file {self.path} has the bands {', '.join(described)}, the model takes "
                    f"{', '.join(missing)} (INPUT.BAND_NAMES)"
                )
            self._bands = [described[name] for name in self.band_names]
        elif len(colors) == channels or (len(colors) == 1 and channels == 3):  # grey
            self._bands = (colors * channels)[:channels]
        elif file.count == channels:
            self._bands = list(range(1, channels + 1))
        else:
            raise ImageFormatError(
                f"image file {self.path} has {file.count} bands, the model takes {channels} "
                "channels (INPUT.CHANNELS)"
            )
        types = {file.dtypes[band - 1] for band in self._bands}
        if types != {"uint8"} and self.value_range is None:
            raise ImageFormatError(
                f"image file {self.path} has values of {', '.join(sorted(types))}: {RANGE_KEY} "
                "(low, high) must say which values are black and white"
            )
        if "palette" in {c.name for c in file.colorinterp}:
            raise ImageFormatError(f"image file {self.path} has a palette; save it as RGB")

    def read(self, window: Window) -> np.ndarray | None:
        import rasterio

        rows, columns = window.slices
        place = rasterio.windows.Window.from_slices(rows, columns)
        limits = {} if "GDAL_CACHEMAX" in os.environ else {"GDAL_CACHEMAX": _CACHE_BYTES}
        with naming_file("image", self.path), _as_value_error(rasterio), rasterio.Env(**limits):
            if not self._file.dataset_mask(window=place).any():
                return None
            pixels = self._file.read(self._bands, window=place).transpose(1, 2, 0)
        if pixels.dtype != np.uint8 and self.value_range is not None:
            values = np.nan_to_num(pixels.astype(np.float64), nan=self.value_range.low)  # nodata
            pixels = scale_to_8_bits(values, self.value_range)
        return np.ascontiguousarray(pixels)


@contextmanager
def _as_value_error(rasterio: Any) -> Iterator[None]:
    try:
        yield
    except rasterio.errors.RasterioError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def has_rasterio() -> bool:
    """Whether the extra ``geo`` is installed."""
    try:
        import rasterio  # noqa: F401  # what counts is whether it can be imported
    except ImportError:
        return False
    return True


def is_raster(path: Path) -> bool:
    """Whether rasterio, if it is installed, reads the file by windows and knows where it lies."""
    return path.suffix.lower() in RASTER_SUFFIXES and has_rasterio()


def _open_dataset(path: Path) -> Any:
    import warnings

    import rasterio

    with naming_file("image", path), _as_value_error(rasterio), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)


def open_raster(
    path: Path,
    num_channels: int,
    value_range: PixelRange | None,
    band_names: Sequence[str] = (),
) -> Raster:
    """An image file to be read by windows: through rasterio if that is installed and knows it.

    Args:
        path: the file.
        num_channels, value_range: see :func:`~spatial_mamba_d2.data.images.read_image`.
        band_names: which bands to take, in this order, if those of the raster have descriptions.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or has other channels or values than the model takes.
    """
    if is_raster(path):
        return GeoRaster(path, num_channels, value_range, band_names)
    return FileRaster(path, num_channels, value_range)


def read_georeference(path: Path) -> Georeference | None:
    """Where a raster lies; None without rasterio, or if the file does not say it."""
    if not is_raster(path):
        return None
    with _open_dataset(path) as file:
        if file.crs is None:
            return None
        return Georeference(file.crs.to_string(), tuple(file.transform)[:6])
