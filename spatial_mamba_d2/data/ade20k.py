"""Semantic segmentation data in folders of images and label maps, checked and counted.

The layout is ADE20K's, or what :class:`~.pair_files.Layout` says. What the label files hold
depends on the data set: see :class:`~.label_format.LabelFormat`. ADE20K's are 0 for unlabelled
pixels, to be ignored, and 1..150 for the classes.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data import ade20k_classes, label_conventions
from spatial_mamba_d2.data.class_file import check_distinct, numbered_names, read_class_lines
from spatial_mamba_d2.data.faults import (
    Fault,
    OnError,
    check_on_error,
    check_once,
    settle_faults,
)
from spatial_mamba_d2.data.label_format import KEY, LabelFormat
from spatial_mamba_d2.data.label_maps import Classes, Pair, check_pair, distinct_colors
from spatial_mamba_d2.data.pair_files import Layout, find_pairs, is_list
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.system.tables import console_table

logger = logging.getLogger(__name__)


def load_classes(source: str, root: str | Path, num_classes: int) -> Classes:
    """Names and colours of the classes.

    Args:
        source: ``"ade20k"``, ``"cityscapes"`` or ``"voc"``; a file in the folder ``root``, with one
            name a line or in the table that ADE20K has in ``objectInfo150.txt``; or ``""`` for
            numbered names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it names another number of classes, or two that are equal.
    """
    if source == "ade20k":
        classes = Classes(ade20k_classes.NAMES, ade20k_classes.PALETTE)
    elif source in label_conventions.CLASSES:
        classes = Classes(*label_conventions.CLASSES[source])
    elif source:
        names = class_names_in(read_class_lines(root, source))
        classes = Classes(names, distinct_colors(len(names)))
    else:
        classes = Classes(numbered_names(num_classes), distinct_colors(num_classes))
    if len(classes.names) != num_classes:
        raise ValueError(
            f"MODEL.NUM_CLASSES must be {len(classes.names)}, the number of classes in "
            f"DATASETS.CLASSES {source!r}, got {num_classes}"
        )
    check_distinct(classes.names, source)
    return classes


def class_names_in(lines: Sequence[str]) -> tuple[str, ...]:
    """The lines as they are, or the names in ADE20K's table: of several synonyms the first one."""
    if not lines or not lines[0].startswith("Idx\t"):
        return tuple(lines)
    complete = tuple(line.split("\t")[-1].strip() for line in lines[1:])
    names = tuple(name.split(",")[0].strip() for name in complete)
    return names if len(set(names)) == len(names) else complete


@dataclass(frozen=True)
class ClassCounts:
    """How often the classes occur in a split.

    Attributes:
        pixels: of each class.
        images: that a class occurs in, of each class.
        ignored_px: pixels that are ignored.
        num_images: all of them.
    """

    pixels: tuple[int, ...]
    images: tuple[int, ...]
    ignored_px: int
    num_images: int

    def table(self, names: Sequence[str]) -> str:
        """For each class: share of the pixels, pixels, images; and what is ignored."""
        total = max(1, sum(self.pixels) + self.ignored_px)
        rows = [
            (name, f"{pixels / total:.2%}", f"{pixels:,}", str(images))
            for name, pixels, images in zip(names, self.pixels, self.images, strict=True)
        ]
        rows.append(("(ignored)", f"{self.ignored_px / total:.2%}", f"{self.ignored_px:,}", ""))
        return console_table(("class", "share", "pixels", "images"), rows)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names of the classes that do not occur."""
        return [name for name, pixels in zip(names, self.pixels, strict=True) if not pixels]


@dataclass(frozen=True)
class CheckedSplit:
    """The usable pairs of a split, how often their classes occur, and what was left out.

    Attributes:
        left_out: kind of fault -> number.
    """

    pairs: list[Pair]
    counts: ClassCounts
    left_out: Mapping[str, int]


def check_split(
    root: str | Path,
    split: str,
    labels: LabelFormat,
    *,
    layout: Layout | None = None,
    num_channels: int = 3,
    value_range: PixelRange | None = None,
    on_error: OnError = "raise",
    check_decode: bool = False,
    root_name: str = "DATASETS.ROOT",
) -> CheckedSplit:
    """The usable pairs of a split, every label file read and every image's size compared.

    That runs once per machine and is remembered for unchanged files.

    Args:
        split: a folder's name, or a file of names, see :func:`~.pair_files.find_pairs`.
        num_channels, value_range: see :func:`~.images.read_image`.
        on_error: ``"raise"`` reports all faults together; ``"skip"`` skips those pairs and warns
            with their number for each kind of fault.
        check_decode: also decode every image, which finds damaged and truncated ones.
        root_name: what names ``root``, for errors.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no pair is usable; with ``"raise"``, any fault.
    """
    check_on_error(on_error)
    pairs, faults = find_pairs(root, split, layout, root_name=root_name)

    content = examine_pairs(pairs, labels, num_channels, value_range, check_decode=check_decode)
    found = {index: Fault(kind, reason) for index, kind, reason in content["faults"]}
    usable = [pair for index, pair in enumerate(pairs) if index not in found]
    faults += found.values()
    where = Path(root, split) if is_list(root, split) else Path(root) / "*" / split
    settle_faults(faults, on_error, where=where, num_usable=len(usable))
    pixels, images = content["pixels"], content["images"]
    counts = ClassCounts(
        tuple(pixels[: labels.num_classes]),
        tuple(images[: labels.num_classes]),
        pixels[labels.ignore],
        len(usable),
    )
    return CheckedSplit(usable, counts, Counter(fault.kind for fault in faults))


def examine_pairs(
    pairs: Sequence[Pair],
    labels: LabelFormat,
    num_channels: int = 3,
    value_range: PixelRange | None = None,
    *,
    check_decode: bool = False,
) -> dict[str, Any]:
    """What :func:`~.label_maps.check_pair` finds, once per machine and unchanged files.

    Returns:
        ``faults``: position of a pair, kind and reason; ``pixels`` and ``images``: of each class
        index, how many pixels and images have it, with what is ignored at ``labels.ignore``.
    """

    def check() -> dict[str, Any]:
        pixels = np.zeros(labels.ignore + 1, np.int64)
        images = np.zeros(labels.ignore + 1, np.int64)
        broken = []
        with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
            found = pool.map(
                lambda pair: check_pair(
                    pair, labels, num_channels, value_range, check_decode=check_decode
                ),
                pairs,
            )
            for index, result in enumerate(found):
                if isinstance(result, Fault):
                    broken.append([index, *result])
                else:
                    pixels += result
                    images += result > 0
        return {"faults": broken, "pixels": pixels.tolist(), "images": images.tolist()}

    return check_once(
        "label_maps",
        [file for pair in pairs for file in (pair.image, pair.label)],
        [asdict(labels), num_channels, value_range, check_decode],
        check,
    )


def load_split(root: str | Path, split: str, labels: LabelFormat, **kwargs: Any) -> list[Pair]:
    """The pairs of :func:`check_split`."""
    return check_split(root, split, labels, **kwargs).pairs


def check_training_counts(
    counts: ClassCounts, names: Sequence[str], labels: LabelFormat, where: str
) -> None:
    """Warns of classes that never occur in training data.

    Raises:
        ValueError: less than two occur: there is nothing to learn, and a perfect score for it.
    """
    missing = counts.missing(names)
    if len(missing) > len(names) - 2:
        present = [name for name in names if name not in missing]
        only = f"only {present[0]!r} occurs" if present else "every pixel is ignored"
        setting = (
            KEY
            if labels.is_map
            else f"DATASETS.LABEL_OFFSET {labels.offset} and IGNORE_LABELS {labels.ignored}"
        )
        hint = ""
        if counts.ignored_px and not labels.is_map:
            hint = (
                f"; {counts.ignored_px:,} pixels are ignored: if one of the ignored values is a "
                f'class, as in masks of 0 and 255, {KEY} "0: 0, 255: 1"'
            )
        raise ValueError(
            f"{where}: at least two classes must occur in the training labels, and by {setting} "
            f"{only}{hint}"
        )
    if missing:
        shown = ", ".join(map(repr, missing[:10])) + (", ..." if len(missing) > 10 else "")
        logger.warning(
            "%s: %d of %d classes have no pixel in the training labels and cannot be learned: %s",
            where,
            len(missing),
            len(names),
            shown,
        )


def unpack(archive: str | Path, root: str | Path) -> None:
    """Unpack a zip of one data set folder to ``root``, which appears when it is complete.

    Does nothing if ``root`` exists.

    Raises:
        FileNotFoundError: no such archive.
        OSError: what it holds does not fit on the disk.
        ValueError: it is damaged, cut off, or holds no folder with ``images`` and ``annotations``.
    """
    root = Path(root)
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as workspace:
        try:
            with zipfile.ZipFile(archive) as content:
                _check_space(content, root.parent)
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


def _check_space(archive: zipfile.ZipFile, folder: Path) -> None:
    """Raises OSError if the files, of the sizes that unpacking never exceeds, do not fit."""
    needed = sum(entry.file_size for entry in archive.infolist())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"archive {archive.filename} unpacks to {needed} bytes, but {folder} has only {free} "
            "bytes left"
        )
