"""Label maps of semantic segmentation: what their integers mean, and how they are read."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from spatial_mamba_d2.data.faults import INACCESSIBLE, Fault, InaccessibleFileError
from spatial_mamba_d2.data.images import naming_file, read_image, read_size
from spatial_mamba_d2.data.segmentation_transforms import IGNORE

LABEL_MODES = ("L", "P", "I", "I;16")  # Pillow's names for one channel of integers


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


@dataclass(frozen=True)
class LabelFormat:
    """What the integers in label files mean.

    Attributes:
        num_classes: class k, from 0, is stored as ``k + offset``.
        offset: 1 in ADE20K, 0 where files hold class indices.
        ignored: integers of pixels that neither train nor count.

    Raises:
        ValueError: there are more classes than 255, or an ignored integer is a class.
    """

    num_classes: int
    offset: int = 1
    ignored: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= IGNORE:
            raise ValueError(f"num_classes must be 1..{IGNORE}, got {self.num_classes}")
        classes = range(self.offset, self.offset + self.num_classes)
        if taken := sorted(set(self.ignored) & set(classes)):
            raise ValueError(
                f"DATASETS.IGNORE_LABELS must be none of the classes' labels {classes.start}.."
                f"{classes.stop - 1}, got {taken[0]}"
            )

    def to_indices(self, stored: np.ndarray) -> np.ndarray:
        """Integers ``[H, W]`` of a file -> class indices and :data:`IGNORE`, ``uint8[H, W]``.

        Raises:
            ValueError: an integer is neither a class nor ignored.
        """
        values = np.unique(stored)
        first, last = self.offset, self.offset + self.num_classes - 1
        wrong = [v for v in values.tolist() if not first <= v <= last and v not in self.ignored]
        if wrong:
            raise ValueError(
                f"label {', '.join(map(str, wrong[:5]))} is impossible: classes are {first}..{last}"
                f" (DATASETS.LABEL_OFFSET {self.offset}), ignored is "
                f"{', '.join(map(str, self.ignored)) or 'none'} (DATASETS.IGNORE_LABELS)"
                f"{self._hint(wrong)}"
            )
        ignored = np.isin(stored, self.ignored)
        return np.where(ignored, IGNORE, stored - self.offset).astype(np.uint8)

    def _hint(self, wrong: Sequence[int]) -> str:
        if self.offset == 1 and wrong == [IGNORE]:
            return "; if 0 is a class and 255 ignored, the offset is 0"
        if self.offset == 0 and wrong == [self.num_classes]:
            return "; if the classes begin at 1, the offset is 1"
        return ""


class Pair(NamedTuple):
    """An image file and its label file."""

    image: Path
    label: Path


def read_label(path: Path) -> np.ndarray:
    """Read a label file as it is, integers ``[H, W]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, cut off, or has more than one channel.
    """
    with naming_file("label", path), Image.open(path) as image:
        if image.mode not in LABEL_MODES:
            raise ValueError(
                f"expected a single channel of integers, got {image.mode} (a label map drawn in "
                "colours is not a label file)"
            )
        return np.asarray(image).astype(np.int64)


def read_pair(pair: Pair, labels: LabelFormat) -> tuple[np.ndarray, np.ndarray]:
    """Image, RGB ``uint8[H, W, 3]``, and class indices, ``uint8[H, W]``.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not usable; the message names it.
    """
    image, stored = read_image(pair.image), read_label(pair.label)
    if image.shape[:2] != stored.shape:
        raise ValueError(_wrong_size(pair, stored.shape, image.shape[:2]))
    return image, _indices(pair, stored, labels)


def _indices(pair: Pair, stored: np.ndarray, labels: LabelFormat) -> np.ndarray:
    try:
        return labels.to_indices(stored)
    except ValueError as error:
        raise ValueError(f"label file {pair.label}: {error}") from None


def _wrong_size(pair: Pair, label: Sequence[int], image: Sequence[int]) -> str:
    return f"label file {pair.label} is {label[0]}x{label[1]}, its image is {image[0]}x{image[1]}"


def find_fault(pair: Pair, labels: LabelFormat, check_decode: bool) -> Fault | None:
    """Why a pair is not usable, if so; reads the label, and of the image only the header.

    Args:
        check_decode: decode the image too.
    """
    try:
        stored = read_label(pair.label)
    except InaccessibleFileError as error:
        return Fault(INACCESSIBLE, str(error))
    except (OSError, ValueError) as error:
        return Fault("unreadable label file", str(error))
    try:
        size = read_image(pair.image).shape[:2] if check_decode else read_size(pair.image)
    except InaccessibleFileError as error:
        return Fault(INACCESSIBLE, str(error))
    except (OSError, ValueError) as error:
        return Fault("unreadable image file", str(error))
    if stored.shape != size:
        return Fault("wrong size", _wrong_size(pair, stored.shape, size))
    try:
        _indices(pair, stored, labels)
    except ValueError as error:
        return Fault("impossible label", str(error))
    return None
