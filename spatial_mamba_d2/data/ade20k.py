"""Semantic segmentation data in ADE20K's folder shape, checked, and as Lightning's data module.

::

    ROOT/images/SPLIT/NAME.jpg          any format that Pillow reads
    ROOT/annotations/SPLIT/NAME.png     one channel of integers, as large as the image

What the integers mean is the data set's own affair: see :class:`LabelFormat`. ADE20K's are 0 for
unlabelled pixels, to be ignored, and 1..150 for the classes.
"""

from __future__ import annotations

import colorsys
import logging
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from spatial_mamba_d2.data import ade20k_classes
from spatial_mamba_d2.data.coco import read_image
from spatial_mamba_d2.data.images import SUFFIXES
from spatial_mamba_d2.data.segmentation_transforms import IGNORE, TestTransform, TrainTransform
from spatial_mamba_d2.data.stream import OnError, StreamedData, TrainingSamples

logger = logging.getLogger(__name__)

LABEL_MODES = ("L", "P", "I", "I;16")  # Pillow's names for one channel of integers
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Classes:
    """Names of the classes and the RGB colours that they are drawn in, by class index."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, ...], ...]


def load_classes(source: str, root: str | Path, number: int) -> Classes:
    """Names and colours of ``number`` classes.

    Args:
        source: ``"ade20k"``; a file in the folder ``root``, with one name a line or in the table
            that ADE20K has in ``objectInfo150.txt``; or ``""`` for names made of numbers.

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
        names = tuple(f"class {index}" for index in range(number))
        classes = Classes(names, distinct_colors(number))
    if len(classes.names) != number:
        raise ValueError(
            f"MODEL.NUM_CLASSES must be {len(classes.names)}, the number of classes in "
            f"DATASETS.CLASSES {source!r}, got {number}"
        )
    return classes


def distinct_colors(number: int) -> tuple[tuple[int, ...], ...]:
    """``number`` RGB colours, each next one far from the last in hue."""
    golden_section = 0.381966
    colors = (
        colorsys.hsv_to_rgb(i * golden_section % 1, 1 - 0.3 * (i // 3 % 2), 1 - 0.3 * (i // 6 % 3))
        for i in range(number)
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


class Fault(NamedTuple):
    """Why a file is not usable: in general, to count by, and in this case."""

    kind: str
    reason: str


def read_label(path: Path) -> np.ndarray:
    """Read a label file as it is, integers ``[H, W]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, cut off, or has more than one channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in LABEL_MODES:
                raise ValueError(
                    f"it must have one channel of integers, and is {image.mode}; "
                    "a picture drawn from labels is no label file"
                )
            return np.asarray(image).astype(np.int64)
    except FileNotFoundError:
        raise FileNotFoundError(f"no label file {path}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"label file {path} cannot be used: {error}") from error


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


def _fault(pair: Pair, labels: LabelFormat, check_decode: bool) -> Fault | None:
    try:
        stored = read_label(pair.label)
    except ValueError as error:
        return Fault("unreadable label file", str(error))
    try:
        if check_decode:
            height, width = read_image(pair.image).shape[:2]
        else:
            with Image.open(pair.image) as image:  # the header only
                width, height = image.size
                if image.getexif().get(0x0112, 1) >= 5:  # turned by a right angle when read
                    height, width = width, height
    except (OSError, ValueError) as error:
        return Fault("unreadable image file", f"image file {pair.image}: {error}")
    if stored.shape != (height, width):
        return Fault("wrong size", _wrong_size(pair, stored.shape, (height, width)))
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

    Args:
        on_error: ``"raise"`` reports all faults together; ``"skip"`` leaves those pairs out and
            warns with their number for each kind of fault.
        check_decode: also decode every image, which finds damaged and truncated ones.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no pair is usable; with ``"raise"``, any fault.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
    pairs, faults = find_pairs(root, split)
    with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
        found = list(pool.map(lambda pair: _fault(pair, labels, check_decode), pairs))
    usable = [pair for pair, fault in zip(pairs, found, strict=True) if fault is None]
    faults += [fault for fault in found if fault]
    where = Path(root) / "*" / split
    if faults and on_error == "raise":
        shown = [fault.reason for fault in faults[:SHOWN_PROBLEMS]]
        more = [f"and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        raise ValueError(
            f"{where}: problems found: {len(faults)}. Correct them, or leave out what they concern "
            f"with DATASETS.ON_ERROR skip\n  " + "\n  ".join(shown + more)
        )
    if not usable:
        reason = f": {faults[0].reason}" if faults else ""
        raise ValueError(f"{where}: no usable pair of image and label{reason}")
    for kind in dict.fromkeys(fault.kind for fault in faults):
        reasons = [fault.reason for fault in faults if fault.kind == kind]
        logger.warning("Left out for %s: %d. The first: %s", kind, len(reasons), reasons[0])
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


class TestImages(Dataset[dict[str, Any]]):
    """One image at a time: ``views``, ``label`` (absent for a broken pair), ``index``, ``file``."""

    __test__ = False

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: LabelFormat,
        transform: TestTransform,
        on_error: OnError,
    ):
        self.pairs = pairs
        self.labels = labels
        self.transform = transform
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {"index": index, "file": str(self.pairs[index].image)}
        try:
            image, label = read_pair(self.pairs[index], self.labels)
        except (OSError, ValueError) as error:
            if self.on_error == "raise":
                raise
            return {**sample, "error": str(error)}
        return {**sample, "views": self.transform(image), "label": torch.from_numpy(label)}


class SegmentationData(StreamedData[Pair]):
    """Training and test images for the trainer.

    Args:
        root, train, test: the folder, and the names of its splits.
        labels: what its label files hold.
        iterations: of the whole training.
        **kwargs: see :class:`~.stream.StreamedData`.

    Raises:
        FileNotFoundError, ValueError: from ``setup``, see :func:`load_split`.
    """

    def __init__(
        self,
        root: str | Path,
        train: str,
        test: str,
        labels: LabelFormat,
        train_transform: TrainTransform,
        test_transform: TestTransform,
        *,
        iterations: int,
        **kwargs: Any,
    ):
        super().__init__(root, train, test, **kwargs)
        self.labels, self.max_iter = labels, iterations
        self.train_transform, self.test_transform = train_transform, test_transform

    def iterations(self) -> int:
        return self.max_iter

    def load_split(self, split: str) -> list[Pair]:
        return load_split(self.root, split, self.labels, on_error=self.on_error)

    def training_samples(self, items: list[Pair]) -> TrainingSamples[Pair]:
        read = partial(read_pair, labels=self.labels)
        return TrainingSamples(items, read, self.train_transform, self.seed, self.on_error)

    def test_samples(self, items: list[Pair]) -> TestImages:
        return TestImages(items, self.labels, self.test_transform, self.on_error)
