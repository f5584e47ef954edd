"""From the pixels that image files hold to 8-bit channels: right values, or a refusal.

===================================  ==============================================================
in the file                          read as
===================================  ==============================================================
up to 8 bits, palette, CMYK, YCbCr   8-bit grey or RGB, as Pillow converts it
alpha                                dropped, as Detectron2 does: the colours under it stay
16 bits, integers from 0             0..255 for the range of the type, or for a :class:`PixelRange`
...of which a small part is used     refused without a range: 12 bits, for example, are nearly black
signed, 32 bits, float               refused without a range
bands that are no colours            refused, unless as many as ``num_channels``; more than four,
                                     and deep ones one after the other, by rasterio
several images of the same size      refused: stacks and animations; not so previews and overviews
===================================  ==============================================================
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from spatial_mamba_d2.data import tiff

MAX_CHANNELS = 16
_MOST_OF_OPENCV = 4  # bands of a TIFF
RANGE_KEY = "INPUT.PIXEL_RANGE"
ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange height and width
# Without a range, 16-bit values must exceed a quarter of the range of their type, and span a
# sixteenth: what 14-bit and 12-bit sensors write would lose most of its levels.
_LEAST_MAXIMUM, _LEAST_SPAN = 1 / 4, 1 / 16
_TEXT_CHUNKS = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")  # of PNG, which may hold the orientation
_PNG_MARK = b"\x89PNG\r\n\x1a\n"
_PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
_MODE_BANDS = {"1": 1, "L": 1, "P": 1, "LA": 2, "PA": 1, "RGBA": 4, "RGBX": 4, "RGBa": 4}
# In a TIFF without compression, whose three bands Pillow takes for four before that.
_PILLOW_READS_YCBCR = int(PIL.__version__.split(".")[0]) >= 13
_DEEP_MODES = {"I;16": (16, "uint"), "I;16B": (16, "uint"), "I;16L": (16, "uint")}


class PixelRange(NamedTuple):
    """The stored values, of files with more than 8 bits, that become 0 and 255."""

    low: float
    high: float


def build_pixel_range(values: Sequence[float]) -> PixelRange | None:
    """From ``INPUT.PIXEL_RANGE``; None, the range of the file's type, if that is empty.

    Raises:
        ValueError: it is neither empty nor (low, high).
    """
    if not values:
        return None
    numbers = [v for v in values if isinstance(v, (int, float)) and np.isfinite(v)]
    if len(values) != 2 or len(numbers) != 2 or not values[0] < values[1]:
        raise ValueError(f"{RANGE_KEY} must be () or (low, high) with low < high, got {values!r}")
    return PixelRange(*map(float, values))


class ImageFormatError(ValueError):
    """An image file is not damaged, but holds pixels that are not read as it is."""


class TooManyPixelsError(ImageFormatError):
    """An image is larger than what may be read."""


class Layout(NamedTuple):
    """What the pixels of an image file are.

    Attributes:
        height, width: as stored.
        orientation: as in EXIF.
        bits: of a value.
        kind: of a value: ``"uint"``, ``"int"`` or ``"float"``.
        bands: values of a pixel, alpha included.
        has_alpha: whether the last band is alpha.
        are_colors: whether the others are grey, a palette's index, or colours.
        header: of a TIFF.
    """

    height: int
    width: int
    orientation: int
    bits: int
    kind: str
    bands: int
    has_alpha: bool
    are_colors: bool
    header: tiff.TiffHeader | None = None

    @property
    def is_plain(self) -> bool:
        """Whether Pillow reads it right."""
        return not self.is_deep and self.are_colors

    @property
    def is_deep(self) -> bool:
        """Whether its values, and not only its header, decide if it can be read right."""
        return self.bits > 8 or self.kind != "uint"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image when it is upright."""
        size = self.height, self.width
        return size[::-1] if self.orientation >= 5 else size


def valid_orientation(value: Any) -> int:
    """1, which changes nothing, for what is no orientation."""
    return value if value in range(1, 9) else 1


def read_layout(file: BinaryIO, max_pixels: int | None = None) -> Layout:
    """From the header of a file.

    Args:
        max_pixels: refuse images with more pixels, before any of them is decoded.

    Raises:
        ValueError, OSError: it is no image, or damaged.
        ImageFormatError: it holds several images.
        TooManyPixelsError: it is larger than ``max_pixels``.
    """
    start = file.read(len(_PNG_MARK) + 18)
    if start.startswith(tiff.MARKS):
        header = tiff.read_tiff_header(file)
        _check_size(header.height, header.width, max_pixels)
        return _tiff_layout(header)
    file.seek(0)
    with Image.open(file) as image:
        width, height = image.size
        _check_size(height, width, max_pixels)
        num_images = getattr(image, "n_frames", 1)
        # The further images of an MPO file, a telephone's JPEG, are previews and depth.
        if num_images > 1 and image.format != "MPO":
            raise ImageFormatError(f"holds {num_images} images; save the one that is meant")
        if image.mode in ("LAB", "HSV"):
            raise ImageFormatError(f"has {image.mode} colours; save it as RGB")
        if image.format == "PPM" and image.mode == "RGB" and _tile_maximum(image) > 255:
            raise ImageFormatError(
                "has colours of 16 bits in a netpbm file; save it as PNG or TIFF"
            )
        # Of PNG, Pillow decodes the pixels to get at what may follow them.
        is_simple_png = start.startswith(_PNG_MARK) and not _has_text_behind_pixels(file)
        exif = Image.Image.getexif(image) if is_simple_png else image.getexif()
        orientation = valid_orientation(exif.get(ORIENTATION))
        bits, kind = _DEEP_MODES.get(image.mode, (8, "uint"))
        if image.mode in ("I", "F"):
            # Pillow's 32 bits hold the 16 of netpbm's greys.
            bits = 16 if image.format == "PPM" else 32
            kind = "uint" if image.format == "PPM" and image.mode == "I" else "int"
            kind = "float" if image.mode == "F" else kind
        bands = _MODE_BANDS.get(image.mode, len(image.getbands()))
        has_alpha = image.mode in ("LA", "RGBA", "RGBa")
    if start.startswith(_PNG_MARK):
        bit_depth, color_type = struct.unpack(">BB", start[24:26])
        bits, kind = max(bit_depth, 8), "uint"
        bands = _PNG_BANDS.get(color_type, bands)
        has_alpha = color_type in (4, 6)
    if image.mode in ("CMYK", "YCbCr"):
        bands = 3  # as which they are read
    return Layout(height, width, orientation, bits, kind, bands, has_alpha, True)


def _check_size(height: int, width: int, max_pixels: int | None) -> None:
    if max_pixels is not None and height * width > max_pixels:
        raise TooManyPixelsError(f"has {height} x {width} pixels; at most {max_pixels} may be read")


def _has_text_behind_pixels(file: BinaryIO) -> bool:
    """Whether a PNG file has, after its pixels, a chunk that could hold the orientation."""
    position, behind = len(_PNG_MARK), False
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return False
        behind |= head[4:] == b"IDAT"
        if behind and head[4:] in _TEXT_CHUNKS:
            return True
        position += 12 + int.from_bytes(head[:4], "big")  # with the chunk's head and checksum


def _tile_maximum(image: Image.Image) -> int:
    """The largest value that an opened netpbm file may hold."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else None  # type: ignore[attr-defined]
    return int(arguments[-1]) if isinstance(arguments, tuple) else 255


def _tiff_layout(header: tiff.TiffHeader) -> Layout:
    if header.num_images > 1:
        raise ImageFormatError(f"holds {header.num_images} images; save the one that is meant")
    if header.photometric == tiff.LAB:
        raise ImageFormatError("has LAB colours; save it as RGB")
    if header.bits not in (1, 2, 4, 8, 16, 32, 64):
        raise ImageFormatError(f"has values of {header.bits} bits; save it with 8 or 16")
    has_alpha = header.has_alpha
    are_colors = bool(header.colors) and header.bands == header.colors + has_alpha
    is_deep = header.bits > 8 or header.kind != "uint"
    if is_deep and header.photometric in (tiff.PALETTE, tiff.CMYK, tiff.YCBCR):
        raise ImageFormatError("has a palette, CMYK or YCbCr colours of 16 bits; save it as RGB")
    if header.photometric == tiff.YCBCR and not header.is_compressed and not _PILLOW_READS_YCBCR:
        raise ImageFormatError(
            "has YCbCr colours without compression, which Pillow reads from version 13 on; this is "
            f"{PIL.__version__}: save it as RGB"
        )
    if header.bands > MAX_CHANNELS:
        raise ImageFormatError(f"has {header.bands} bands; at most {MAX_CHANNELS} can be read")
    if is_deep and header.extra[:1] == (1,):
        raise ImageFormatError("has more than 8 bits, multiplied with alpha; save it without alpha")
    bands = header.bands
    if are_colors and header.photometric in (tiff.CMYK, tiff.YCBCR):
        bands = 3 + has_alpha
    return Layout(
        header.height,
        header.width,
        valid_orientation(header.orientation),
        header.bits,
        header.kind,
        bands,
        has_alpha,
        are_colors,
        header,
    )


def check_layout(layout: Layout, num_channels: int, value_range: PixelRange | None) -> None:
    """Raises ImageFormatError for what :func:`read_pixels` refuses, as far as the header says."""
    colors = layout.bands - layout.has_alpha
    fits = layout.bands == num_channels or (layout.are_colors and num_channels in (1, 3))
    if not fits:
        what = f"{layout.bands} bands" + (", the last one alpha" if layout.has_alpha else "")
        hint = ""
        if not layout.are_colors and colors > 3:
            hint = " (they are not declared as RGB and alpha, so none is dropped)"
        raise ImageFormatError(
            f"has {what}{hint}, the model takes {num_channels} channels (INPUT.CHANNELS)"
        )
    if value_range is None and (layout.kind != "uint" or layout.bits > 16):
        name = {"int": "signed integers", "uint": "integers", "float": "float values"}[layout.kind]
        raise ImageFormatError(
            f"has {name} of {layout.bits} bits: {RANGE_KEY} (low, high) must say which values are "
            "black and white"
        )


def read_pixels(
    file: BinaryIO,
    layout: Layout,
    num_channels: int,
    value_range: PixelRange | None,
    upright: bool,
) -> np.ndarray:
    """Decode a file that :func:`check_layout` has accepted.

    Args:
        upright: apply the EXIF orientation. That of a TIFF file is always applied, as Pillow does.

    Returns:
        ``uint8[H, W, num_channels]``; grey becomes equal channels, colours become grey by
        luminance.

    Raises:
        ValueError, OSError: the file is damaged or cut off.
        ImageFormatError: its values do not fit the range.
    """
    file.seek(0)
    if layout.is_plain:
        try:
            return _read_plain(file, num_channels, upright)
        except UnidentifiedImageError:  # Pillow knows fewer kinds of TIFF
            header = layout.header
            if not header or header.bits < 8 or header.photometric > tiff.RGB:
                raise
            file.seek(0)
    stored: np.ndarray = _read_deep(file, layout)
    if stored.shape[:2] != (layout.height, layout.width):
        raise ValueError(f"is {stored.shape[:2]}, its header says {layout.size}")
    pixels: np.ndarray
    if layout.bits <= 8 and layout.kind == "uint":
        pixels = stored.astype(np.uint8)
    else:
        pixels = _to_8_bits(stored, layout, value_range)
    if layout.header and layout.header.photometric == tiff.GREY_INVERTED:
        pixels = 255 - pixels
    if upright or layout.header:
        pixels = _turned(pixels, layout.orientation)
    if layout.has_alpha and layout.bands != num_channels:
        pixels = pixels[..., :-1]
    if num_channels == 1 and pixels.shape[2] == 3:
        pixels = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)[..., None]
    if num_channels == 3 and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels)


def _read_plain(file: BinaryIO, num_channels: int, upright: bool) -> np.ndarray:
    with Image.open(file) as image:
        turned = ImageOps.exif_transpose(image) if upright else image
        return np.array(to_mode(turned, num_channels)).reshape(
            turned.height, turned.width, num_channels
        )


def to_mode(image: Image.Image, num_channels: int) -> Image.Image:
    """Pillow's image with that many channels; alpha, unless it is the last of them, is dropped."""
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[num_channels]
    if num_channels == 1 and image.mode not in ("1", "L", "LA"):
        image = image.convert("RGB")
    return image.convert(mode)


def _read_deep(file: BinaryIO, layout: Layout) -> np.ndarray:
    """Stored values, ``[H, W, bands]``, colours in the order R, G, B."""
    content = file.read()
    if layout.header and not _fits_opencv(layout, layout.header):
        return _read_bands(content, layout.bands)
    if layout.header is None:
        file.seek(0)
        with Image.open(file) as image:
            image.load()  # OpenCV takes some files that are cut off for complete ones
            if layout.bands == 1:
                return np.asarray(image)[..., None]
    else:
        content = layout.header.as_plain_bands(content)
    decoded: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise ValueError("OpenCV cannot read it; it is damaged, or of a rare type")
    pixels: np.ndarray = np.atleast_3d(decoded)
    if (layout.bits, layout.kind) == (32, "uint"):  # which as_plain_bands has declared as signed
        pixels = pixels.view(np.uint32)
    if pixels.shape[2] >= 3:
        pixels = pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]
    if layout.bands == 2 and pixels.shape[2] == 4:  # OpenCV's grey with alpha
        pixels = pixels[..., 2:]
    if layout.bands == 3 and pixels.shape[2] == 4:  # a PNG's transparent color
        pixels = pixels[..., :3]
    if pixels.shape[2] != layout.bands:
        raise ValueError(f"{pixels.shape[2]} of {layout.bands} bands can be decoded")
    return pixels


def _fits_opencv(layout: Layout, header: tiff.TiffHeader) -> bool:
    """Whether OpenCV keeps the bands of a TIFF, and their order."""
    if layout.bands == 2 and not layout.are_colors:
        return False
    is_planar = header.is_planar and layout.bands > 1
    return layout.bands <= _MOST_OF_OPENCV and not (layout.is_deep and is_planar)


def _read_bands(content: bytes, num_bands: int) -> np.ndarray:
    """A TIFF of many bands, or of deep ones that are stored one after the other, by rasterio."""
    try:
        import rasterio
    except ImportError as error:
        raise ImageFormatError(
            f"has {num_bands} bands: without rasterio (pip install 'spatial-mamba-d2[geo]') at "
            f"most {_MOST_OF_OPENCV} can be read, and deep ones only if they are stored pixel by "
            "pixel"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with rasterio.MemoryFile(content) as memory, memory.open() as image:
                return np.ascontiguousarray(image.read().transpose(1, 2, 0))
        except rasterio.errors.RasterioError as error:
            raise ValueError(str(error.__cause__ or error)) from error


def _to_8_bits(stored: np.ndarray, layout: Layout, value_range: PixelRange | None) -> np.ndarray:
    """Values of more than 8 bits -> ``uint8``, by the range."""
    colors = stored[..., : layout.bands - layout.has_alpha]
    low, high = colors.min(), colors.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageFormatError("has values that are not finite")
    if value_range is None:
        top = 2**layout.bits - 1
        is_narrow = high < _LEAST_MAXIMUM * top or high - low < _LEAST_SPAN * top
        if is_narrow and not low == high in (0, top):
            raise ImageFormatError(
                f"has {layout.bits} bits of which it uses {low}..{high} only, and would be nearly "
                f"uniform: {RANGE_KEY} (low, high) must say which values are black and white, for "
                f"all files; (0, {top}) takes them as they are"
            )
        value_range = PixelRange(0, top)
    else:
        _check_fit(float(low), float(high), layout, value_range)
    if stored.dtype.itemsize == 2 and stored.dtype.kind == "u":
        table = scale_to_8_bits(np.arange(1 << 16, dtype=np.float64), value_range)
        return table[stored]
    return scale_to_8_bits(stored.astype(np.float64), value_range)


def _check_fit(low: float, high: float, layout: Layout, value_range: PixelRange) -> None:
    """Refuse values ``low..high`` of which the range leaves no more than one step of 255.

    Not if all are equal, nor if the range is that of the type, which cannot be a mistaken unit.
    """
    is_whole = layout.kind == "uint" and value_range == (0, 2**layout.bits - 1)
    left = min(high, value_range.high) - max(low, value_range.low)
    if low == high or is_whole or left > (value_range.high - value_range.low) / 255:
        return
    what = "nearly uniform"
    if low >= value_range.high:
        what = "all white"
    elif high <= value_range.low:
        what = "all black"
    raise ImageFormatError(
        f"has values {low:g}..{high:g}, {what} by {RANGE_KEY} ({value_range.low:g}, "
        f"{value_range.high:g})"
    )


def scale_to_8_bits(values: np.ndarray, value_range: PixelRange) -> np.ndarray:
    """Values, float64 -> ``uint8``: the range becomes 0 .. 255; others are clipped."""
    low, high = value_range
    return np.rint((values.clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As :func:`PIL.ImageOps.exif_transpose`."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    vertical = orientation in (3, 4, 7, 8)
    horizontal = orientation in (2, 3, 6, 7)
    if vertical:
        pixels = pixels[::-1]
    return pixels[:, ::-1] if horizontal else pixels
