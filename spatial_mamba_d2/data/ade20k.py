"""Semantic segmentation data in ADE20K's folder layout, checked.

::

    ROOT/images/SPLIT/NAME.jpg          any format that Pillow reads
    ROOT/annotations/SPLIT/NAME.png     one channel of integers, as large as the image

What the integers mean depends on the data set: see :class:`~.label_maps.LabelFormat`. ADE20K's are
0 for unlabelled pixels, to be ignored, and 1..150 for the classes.
"""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from spatial_mamba_d2.data import ade20k_classes
from spatial_mamba_d2.data.class_file import read_class_lines
from spatial_mamba_d2.data.faults import Fault, OnError, check_on_error, check_once, settle_faults
from spatial_mamba_d2.data.images import SUFFIXES
from spatial_mamba_d2.data.label_maps import (
    Classes,
    LabelFormat,
    Pair,
    distinct_colors,
    find_fault,
)


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
        lines = read_class_lines(root, source)
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

    def find_faults() -> list[tuple[int, Fault]]:
        with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
            found = pool.map(lambda pair: find_fault(pair, labels, check_decode), pairs)
            return [(index, fault) for index, fault in enumerate(found) if fault]

    files = [file for pair in pairs for file in pair]
    found = dict(check_once("ade20k", files, [asdict(labels), check_decode], find_faults))
    usable = [pair for index, pair in enumerate(pairs) if index not in found]
    faults += found.values()
    settle_faults(faults, on_error, where=Path(root) / "*" / split, num_usable=len(usable))
    return usable


def unpack(archive: str | Path, root: str | Path) -> None:
    """Unpack a zip of one data set folder to ``root``, which appears when it is complete.

    Does nothing if ``root`` exists.

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
