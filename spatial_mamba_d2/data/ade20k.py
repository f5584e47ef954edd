"""Semantic segmentation data in ADE20K's folder layout, checked.

::

    ROOT/images/SPLIT/NAME.jpg          any format that Pillow reads
    ROOT/annotations/SPLIT/NAME.png     one channel of integers, as large as the image

What the integers mean is the data set's own affair: see :class:`LabelFormat`. ADE20K's are 0 for
unlabelled pixels, to be ignored, and 1..150 for the classes.
"""

from __future__ import annotations

import colorsys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from spatial_mamba_d2.data import ade20k_classes
from spatial_mamba_d2.data.faults import Fault, OnError, check_on_error, settle_faults
from spatial_mamba_d2.data.images import SUFFIXES, naming_file, read_image, read_size
from spatial_mamba_d2.data.segmentation_transforms import IGNORE
from spatial_mamba_d2.system.once import once_per_machine

LABEL_MODES = ("L", "P", "I", "I;16")  # Pillow's names for one channel of integers


@dataclass(frozen=True)
class Classes:
    """Names of the classes and the RGB colours that they are drawn in, by class index."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, ...], ...]


def load_classes(source: str, root: str | Path, num_classes: int) -> Classes:
    """Names and colours of the classes.

    Args:
        source: ``"ade20k"``; a file in the folder ``root``, with one name a line or in the table
            that ADE20K has in ``objectInfo150.txt``; or ``""`` for numbered names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it names another number of classes.
    """
    if source == "ade20k":
        classes = Classes(ade20k_classes.NAMES, ade20k_classes.PALETTE)
    elif source:
        path = Path(root, source)
        if not path.is_file():
            raise FileNotFoundError(f"DATASETS.CLASSES: no such file: {path}")
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if lines and lines[0].startswith("Idx\t"):
            lines = [line.split("\t")[-1] for line in lines[1:]]
        names = tuple(line.split(",")[0].strip() for line in lines)
        classes = Classes(names, distinct_colors(len(names)))
    else:
        names = tuple(f"class {index}" for index in range(num_classes))
        classes = Classes(names, distinct_colors(num_classes))
    if len(classes.names) != num_classes:
        raise ValueError(
            f"MODEL.NUM_CLASSES must be {len(classes.names)}, the number of classes in "
            f"DATASETS.CLASSES {source!r}, got {num_classes}"
        )
    return classes


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


def find_pairs(root: str | Path, split: str) -> tuple[list[Pair], list[Fault]]:
    """The pairs of ``root/images/split`` and ``root/annotations/split``, and files without partner.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    folders = [Path(root, kind, split) for kind in ("images", "annotations")]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"DATASETS.ROOT: no folder {folder} (datasets/README.md shows the tree)"
            )
    images, labels = (
        {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
        for folder in folders
    )
    faults = [
        Fault("image without label", f"{path}: no {folders[1] / path.stem}.png")
        for stem, path in images.items()
        if stem not in labels
    ] + [
        Fault("label without image", f"{path}: no image {path.stem} in {folders[0]}")
        for stem, path in labels.items()
        if stem not in images
    ]
    return [Pair(images[stem], labels[stem]) for stem in images if stem in labels], faults


def _find_fault(pair: Pair, labels: LabelFormat, check_decode: bool) -> Fault | None:
    try:
        stored = read_label(pair.label)
    except ValueError as error:
        return Fault("unreadable label file", str(error))
    try:
        size = read_image(pair.image).shape[:2] if check_decode else read_size(pair.image)
    except (OSError, ValueError) as error:
        return Fault("unreadable image file", str(error))
    if stored.shape != size:
        return Fault("wrong size", _wrong_size(pair, stored.shape, size))
    try:
        _indices(pair, stored, labels)
    except ValueError as error:
        return Fault("impossible label", str(error))
    return None


def load_split(
    root: str | Path,
    split: str,
    labels: LabelFormat,
    *,
    on_error: OnError = "raise",
    check_decode: bool = False,
) -> list[Pair]:
    """The usable pairs of a split, every label file read and every image's size compared.

    That runs once per machine and is remembered for unchanged files.

    Args:
        on_error: ``"raise"`` reports all faults together; ``"skip"`` skips those pairs and warns
            with their number for each kind of fault.
        check_decode: also decode every image, which finds damaged and truncated ones.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no pair is usable; with ``"raise"``, any fault.
    """
    check_on_error(on_error)
    pairs, faults = find_pairs(root, split)

    def find_faults() -> list[Fault | None]:
        with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
            return list(pool.map(lambda pair: _find_fault(pair, labels, check_decode), pairs))

    files = [file for pair in pairs for file in pair]
    found = once_per_machine("ade20k", files, [asdict(labels), check_decode], find_faults)
    usable = [pair for pair, fault in zip(pairs, found, strict=True) if fault is None]
    faults += [Fault(*fault) for fault in found if fault]
    settle_faults(faults, on_error, where=Path(root) / "*" / split, num_usable=len(usable))
    return usable


def unpack(archive: str | Path, root: str | Path) -> None:
    """Unpack a zip of one data set folder to ``root``, which appears when it is complete.

    Nothing happens where ``root`` is there already.

    Raises:
        FileNotFoundError: no such archive.
        ValueError: it is damaged, cut off, or holds no folder with ``images`` and ``annotations``.
    """
    root = Path(root)
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as workspace:
        try:
            with zipfile.ZipFile(archive) as content:
                content.extractall(workspace)  # never outside of it, whatever the names
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"archive {archive} is damaged or cut off: {error}") from error
        trees = [
            images.parent
            for images in Path(workspace).rglob("images")
            if images.is_dir() and images.with_name("annotations").is_dir()
        ]
        if len(trees) != 1:
            raise ValueError(
                f"archive {archive} must hold one folder with images and annotations, "
                f"got {len(trees)}"
            )
        trees[0].replace(root)
