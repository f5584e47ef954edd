"""Folders of images and label maps, as ADE20K, Pascal VOC, Cityscapes and many people have them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from spatial_mamba_d2.data.faults import Finding
from spatial_mamba_d2.data.formats.instance_builder import SPLIT_NAMES, name_split
from spatial_mamba_d2.data.formats.label_values import decide, find_names
from spatial_mamba_d2.data.formats.records import ALL, LabelledData, Split, UnusableDataError
from spatial_mamba_d2.data.images import SUFFIXES, files_below, is_litter
from spatial_mamba_d2.data.label_maps import Pair
from spatial_mamba_d2.data.pair_files import Layout, find_pairs

_IMAGE_WORDS = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
_LABEL_WORDS = (
    "annotations", "annotation", "labels", "label", "masks", "mask", "segmentationclass",
    "segmentations", "segmentation", "gtfine", "gt",
)  # fmt: skip
_SUFFIXES = ("_mask", "_masks", "_label", "_labels", "_seg", "_gt", "_L", "-mask", ".mask")


class Tree(NamedTuple):
    """Folders of images and labels, and the name of each split's folder, or file of names."""

    layout: Layout
    splits: dict[str, str]


def find_tree(root: Path) -> Tree | None:
    """The layout of ``root``, or None if it has no images with label maps."""
    folders = _folders(root)
    if "jpegimages" in folders and "segmentationclass" in folders:
        lists = {
            split: f"ImageSets/Segmentation/{split}.txt"
            for split in SPLIT_NAMES
            if Path(root, f"ImageSets/Segmentation/{split}.txt").is_file()
        }
        layout = Layout(folders["jpegimages"], folders["segmentationclass"])
        return Tree(layout, lists or {ALL: ""})
    for images in (folders[word] for word in _IMAGE_WORDS if word in folders):
        for labels in (folders[word] for word in _LABEL_WORDS if word in folders):
            common = _folders(root / images).keys() & _folders(root / labels).keys()
            splits = _splits(_folders(root / images)[name] for name in common)
            if splits:
                layout = Layout(f"{images}/{{split}}", f"{labels}/{{split}}")
            else:
                layout, splits = Layout(images, labels), {ALL: ""}
            if found := _with_pairs(root, layout, splits):
                return found
    outer = _splits(folders.values())
    for first in list(outer.values())[:1]:
        inner = _folders(root / first)
        for images in (inner[word] for word in _IMAGE_WORDS if word in inner):
            for labels in (inner[word] for word in _LABEL_WORDS if word in inner):
                layout = Layout(f"{{split}}/{images}", f"{{split}}/{labels}")
                if found := _with_pairs(root, layout, outer):
                    return found
    return _side_by_side(root, outer)


def _side_by_side(root: Path, outer: dict[str, str]) -> Tree | None:
    """``x.jpg`` and ``x_mask.png`` in one folder."""
    stems = {path.with_suffix("") for path in _images(root)}
    counts = Counter(
        suffix
        for stem in stems
        for suffix in _SUFFIXES
        if stem.name.endswith(suffix) and stem.with_name(stem.name[: -len(suffix)]) in stems
    )
    if not counts:
        return None
    suffix = counts.most_common(1)[0][0]
    folder = "{split}" if outer else ""
    return _with_pairs(root, Layout(folder, folder, "", suffix), outer or {ALL: ""})


def _with_pairs(root: Path, layout: Layout, splits: dict[str, str]) -> Tree | None:
    """The tree if there are pairs, with the suffixes that make them."""
    split = next(iter(splits.values()))
    places = [
        Path(root, *(part.format(split=split) for part in Path(template).parts if part))
        for template in (layout.image_folder, layout.label_folder)
    ]
    if not all(place.is_dir() for place in places):
        return None
    labels = _images(places[1])
    if layout.label_suffix or find_pairs(root, split, layout)[0]:
        return Tree(layout, splits)
    if layout.image_folder.lower().startswith("leftimg8bit"):
        layout = replace(layout, image_suffix="_leftImg8bit", label_suffix="_gtFine_labelIds")
    elif suffix := _common_suffix(_images(places[0]), labels):
        layout = replace(layout, label_suffix=suffix)
    return Tree(layout, splits) if find_pairs(root, split, layout)[0] else None


def _common_suffix(images: Sequence[Path], labels: Sequence[Path]) -> str:
    """What follows the name of an image in the name of its label, for most of a sample."""
    stems = sorted((image.stem for image in images), key=len, reverse=True)
    rests: Counter[str] = Counter()
    for label in labels[:20]:
        stem = next((stem for stem in stems if label.stem.startswith(stem)), None)
        if stem is not None:
            rests[label.stem[len(stem) :]] += 1
    return rests.most_common(1)[0][0] if rests else ""


def _folders(path: Path) -> dict[str, str]:
    """Name in small letters -> name."""
    if not path.is_dir():
        return {}
    return {f.name.lower(): f.name for f in sorted(path.iterdir())
            if f.is_dir() and not is_litter(f)}  # fmt: skip


def _splits(names: object) -> dict[str, str]:
    found = {name_split([name]): name for name in sorted(names)}  # type: ignore[call-overload]
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def _images(folder: Path) -> list[Path]:
    return [f for f in files_below(folder) if f.suffix.lower() in SUFFIXES]


def read_label_tree(path: Path, tree: Tree, name: str) -> LabelledData:
    """Find the pairs, and what their labels mean.

    Args:
        name: of the format.

    Raises:
        UnusableDataError: no pairs, or labels that cannot be classes.
        ValueError: a file of names is no text.
    """
    findings: list[Finding] = []
    splits: dict[str, Split] = {}
    pairs: list[Pair] = []
    for split, folder in tree.splits.items():
        found, faults = find_pairs(path, folder, tree.layout, root_name="path")
        for fault in faults:
            file = fault.reason.split(": ")[0].split(", ")[0]
            findings.append(Finding(fault.kind, file, fault.reason))
        splits[split] = found
        pairs += found
    if not pairs:
        raise UnusableDataError(f"{path}: no image has a label map of its name")
    of_splits = [Path(path, folder) for folder in tree.splits.values() if folder]
    places = [path, *(f for f in of_splits if f.is_dir()), path.parent]
    table = find_names([p for p in places if os.path.isdir(p)])
    classes, labels, meaning = decide(pairs, table, "segmentationclass" in
                                      tree.layout.label_folder.lower())  # fmt: skip
    notes = [f"labels: {meaning}", f"folders: {tree.layout.image_folder or '.'} and "
             f"{tree.layout.label_folder or '.'}{tree.layout.label_suffix}"]  # fmt: skip
    return LabelledData(path, name, "segmentation", classes, splits, findings, notes, labels=labels)
