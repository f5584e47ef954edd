"""Label maps of semantic segmentation: how they are read, checked and counted."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from spatial_mamba_d2.data.faults import Fault, reading_fault
from spatial_mamba_d2.data.images import naming_file, orientation_hint, read_image, read_size
from spatial_mamba_d2.data.label_format import KEY, LabelFormat
from spatial_mamba_d2.data.pixels import ImageFormatError, PixelRange
from spatial_mamba_d2.data.tiff import read_tiff_header

# Pillow's names for one channel of integers
_INTEGER_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
_COLOR_MODES = ("RGB", "RGBA", "LA", "PA", "RGBX")
_LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "AVIF", "HEIF")
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp", "jpeg2000")  # of TIFF
# Grey values of 2 and 4 bits, which Pillow stretches to 0..255
_STRETCHED = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True)
class Classes:
    """Names of the classes and the RGB colours that they are drawn in, by class index."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, ...], ...]


def distinct_colors(num_colors: int) -> tuple[tuple[int, ...], ...]:
    """RGB colours, each far from the one before in hue."""
    golden_section = 0.381966
    colors = (
        colorsys.hsv_to_rgb(i * golden_section % 1, 1 - 0.3 * (i // 3 % 2), 1 - 0.3 * (i // 6 % 3))
        for i in range(num_colors)
    )
    return tuple(tuple(round(255 * channel) for channel in color) for color in colors)


class Pair(NamedTuple):
    """An image file and its label file, and the name that they have in common.

    ``name`` is the path below their folders, without suffixes.
    """

    image: Path
    label: Path
    name: str


def read_label(path: Path, labels: LabelFormat | None = None) -> np.ndarray:
    """Read a label file: the stored values, upright as its EXIF orientation says, as an image's.

    Returns:
        integers ``[H, W]``; colours ``uint8[H, W, 3]`` if the file has them, or if ``labels`` knows
        nothing but colours.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, cut off, of a lossy format, of fractions, or of several images or
            channels, unless ``labels`` gives colours a meaning.
    """
    # Pillow maps a file that it opens itself into the memory, and mixes up turned pixels then.
    with naming_file("label", path), path.open("rb") as file, Image.open(file) as opened:
        image: Image.Image = opened
        if reason := _not_a_label(image, path):
            raise ImageFormatError(reason)
        stretch = _STRETCHED.get(_raw_mode(image), 1)
        image.load()
        image = ImageOps.exif_transpose(image)
        only_colors = labels is not None and labels.only_colors
        if image.mode in _INTEGER_MODES and not only_colors:
            stored = np.asarray(image)
            if stored.dtype == bool:
                return stored.astype(np.uint8)
            return stored // stretch if stretch > 1 else stored
        if image.mode.startswith("I"):
            raise ImageFormatError(f"has integers of {image.mode}, and {KEY} lists only colours")
        colors = np.asarray(image.convert("RGBA"))
        if image.mode != "P" and (colors[..., 3] != 255).any():
            raise ImageFormatError("has transparent pixels: their label is not known")
        if labels is None or not labels.colors:
            raise ImageFormatError(_why_no_colors(image.mode, colors))
        return colors[..., :3]


def read_bitmap(file: BinaryIO) -> np.ndarray:
    """A mask of one object that stands in another file: ``bool[H, W]``, true where not 0.

    Raises:
        ValueError: it is no image of one channel.
    """
    with naming_file("mask", "in a file of labels"), Image.open(file) as image:
        if image.mode not in _INTEGER_MODES:
            raise ImageFormatError(f"must have one channel, and has mode {image.mode}")
        return np.asarray(image) > 0


def _raw_mode(image: Image.Image) -> str:
    """How the pixels are stored, in Pillow's words, as far as it tells."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return mode if isinstance(mode, str) else ""


def _not_a_label(image: Image.Image, path: Path) -> str:
    """What about the type of an opened file cannot be a label map, from its header; or ""."""
    compression = str(image.info.get("compression", ""))
    lossy = image.format in _LOSSY_FORMATS or compression in _LOSSY_COMPRESSIONS
    if lossy or (image.format == "WEBP" and _is_lossy_webp(path)):
        kind = f"{image.format} of {compression}" if compression else image.format
        return (
            f"is {kind}, a lossy format, which changes labels: save label maps as PNG, from the "
            "original annotations"
        )
    if (num_images := _num_images(image, path)) > 1:
        return f"must hold one image, and has {num_images}"
    if image.mode == "F":
        return "must hold integers, and has fractions (mode F): round them and save 8 or 16 bits"
    if image.mode not in (*_INTEGER_MODES, *_COLOR_MODES):
        return f"must have one channel of integers, or RGB colours, and has mode {image.mode}"
    if image.mode in _COLOR_MODES and ";16" in _raw_mode(image):
        return "must have colours of 8 bits, and has 16"
    return ""


def _num_images(image: Image.Image, path: Path) -> int:
    """How many images a file holds, without the reduced copies that maps have."""
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1)
    with path.open("rb") as file:
        return read_tiff_header(file).num_images


def _is_lossy_webp(path: Path) -> bool:
    """Whether a chunk of a WebP file holds a lossy image."""
    content = path.read_bytes()
    position = 12
    while position + 8 <= len(content):
        kind = content[position : position + 4]
        if kind in (b"VP8 ", b"ANIM"):
            return True
        if kind == b"VP8L":
            return False
        size = int.from_bytes(content[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
    return True


def _why_no_colors(mode: str, colors: np.ndarray) -> str:
    grey = (colors[..., :1] == colors[..., 1:3]).all()
    example = f'such as "#{bytes(colors[0, 0, :3].tolist()).hex()}: 0"'
    if grey:
        return (
            f"has channels {mode} that are equal: save one of them as the label map, or list its "
            f"greys as colours in {KEY}, {example}"
        )
    return (
        f"must have a single channel of integers, got {mode}: for a label map drawn in colours, "
        f"{KEY} says which colour is which class, {example}"
    )


def read_pair(
    pair: Pair,
    labels: LabelFormat,
    num_channels: int = 3,
    value_range: PixelRange | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Image, ``uint8[H, W, num_channels]`` (3: RGB), and class indices, ``[H, W]``.

    Args:
        num_channels, value_range: see :func:`~.images.read_image`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not usable; the message names it.
    """
    image = read_image(pair.image, num_channels, value_range)
    stored = read_label(pair.label, labels)
    if image.shape[:2] != stored.shape[:2]:
        raise ValueError(_wrong_size(pair, stored.shape, image.shape))
    return image, _indices(pair, stored, labels)


def _indices(pair: Pair, stored: np.ndarray, labels: LabelFormat) -> np.ndarray:
    try:
        return labels.to_indices(stored)
    except ValueError as error:
        raise ValueError(f"label file {pair.label}: {error}") from None


def _wrong_size(pair: Pair, label: Sequence[int], image: Sequence[int]) -> str:
    return (
        f"label file {pair.label} is {label[0]}x{label[1]}, its image is {image[0]}x{image[1]}"
        f"{orientation_hint(pair.image, label[:2])}"
    )


def check_pair(
    pair: Pair,
    labels: LabelFormat,
    num_channels: int = 3,
    value_range: PixelRange | None = None,
    *,
    check_decode: bool = False,
) -> Fault | np.ndarray:
    """Why a pair is not usable, or how many pixels each class has.

    Reads the label, and of the image only the header.

    Args:
        num_channels, value_range: see :func:`~.images.read_image`.
        check_decode: decode the image too.

    Returns:
        the fault, or pixels by class index, with those that are ignored at ``labels.ignore``, the
        last one.
    """
    try:
        stored = read_label(pair.label, labels)
    except (OSError, ValueError) as error:
        return reading_fault("unreadable label file", error)
    try:
        if check_decode:
            size = read_image(pair.image, num_channels, value_range).shape[:2]
        else:
            size = read_size(pair.image, num_channels, value_range)
    except (OSError, ValueError) as error:
        return reading_fault("unreadable image file", error)
    if stored.shape[:2] != size:
        return Fault("wrong size", _wrong_size(pair, stored.shape, size))
    try:
        indices = _indices(pair, stored, labels)
    except ValueError as error:
        return Fault("impossible label", str(error))
    return np.bincount(indices.ravel(), minlength=labels.ignore + 1)
