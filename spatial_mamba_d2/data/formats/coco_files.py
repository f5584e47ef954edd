"""COCO's JSON files: which split each one is, and where its images are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.coco import read_sections
from spatial_mamba_d2.data.formats.instance_builder import SPLIT_NAMES, name_split
from spatial_mamba_d2.data.formats.records import (
    ALL,
    Instances,
    LabelledData,
    Split,
    UnusableDataError,
)
from spatial_mamba_d2.data.images import is_litter

_SAMPLE = 40  # images by which a folder is judged
_MAX_FOLDERS = 2000


def is_coco(content: Any) -> bool:
    """Whether a JSON file is COCO's, also if one of its three sections is missing."""
    if not isinstance(content, dict):
        return False
    num_sections = sum(
        isinstance(content.get(s), list) for s in ("images", "annotations", "categories")
    )
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    is_other = isinstance(first, dict) and ("segments_info" in first or "caption" in first)
    return num_sections >= 2 and not is_other


def split_of_file(file: Path, root: Path) -> str:
    """``train`` of ``instances_train2017.json`` and ``train/_annotations.coco.json``."""
    words = [word for word in re.split(r"[^a-z]+", file.stem.lower()) if word]
    split = name_split(words)
    parts = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
    return split if split != ALL else name_split(parts)


def read_coco(path: Path, files: Sequence[Path]) -> LabelledData:
    """Read COCO files, one for each split, or one for all.

    Raises:
        UnusableDataError: several files are of one split.
        ValueError: a file is not JSON, or has no sections of COCO.
    """
    root = path if path.is_dir() else path.parent
    of_split: dict[str, list[Path]] = {}
    for file in files:
        split = ALL if path.is_file() else split_of_file(file, root)
        of_split.setdefault(split, []).append(file)
    splits: dict[str, Split] = {}
    names: dict[str, None] = {}
    notes = []
    for split in (*SPLIT_NAMES, ALL):
        candidates = of_split.get(split, [])
        instances = [f for f in candidates if f.stem.startswith("instances")]
        chosen = candidates if len(candidates) == 1 else instances
        if not candidates or (split == ALL and splits):
            continue
        if len(chosen) != 1:
            shown = ", ".join(str(file) for file in candidates[:5])
            raise UnusableDataError(
                f"{path}: {len(candidates)} COCO files may be the split {split!r}; name the one "
                f"that is meant: {shown}"
            )
        content = read_sections(chosen[0])
        image_root = find_image_root(chosen[0], content, root)
        notes.append(f"{split}: {chosen[0]}, images in {image_root}")
        splits[split] = Instances(content, image_root, chosen[0])
        names |= dict.fromkeys(_class_names(content))
    return LabelledData(path, "coco", "detection", tuple(names), splits, notes=notes)


def _class_names(content: dict[str, list[Any]]) -> list[str]:
    named = [
        (category.get("id"), str(category["name"]))
        for category in content["categories"]
        if isinstance(category, dict) and isinstance(category.get("name"), (str, int))
    ]
    try:
        named.sort()
    except TypeError:  # ids of several types, which the checks report
        pass
    return [name for _, name in named]


def find_image_root(json_file: Path, content: dict[str, list[Any]], root: Path) -> Path:
    """The folder in which most of the images are that a sample of ``file_name`` names."""
    entries = content["images"]
    step = max(1, len(entries) // _SAMPLE)
    names = [
        image["file_name"].replace("\\", "/")
        for image in entries[::step]
        if isinstance(image, dict) and isinstance(image.get("file_name"), str)
    ]
    parent = json_file.parent
    near = [parent, parent / "images", parent.parent / "images", parent.parent]
    found: dict[Path, int] = {}
    for folder in (*near, *islice(_folders(root), _MAX_FOLDERS)):
        if folder not in found:
            found[folder] = sum(os.path.isfile(os.path.join(folder, name)) for name in names)
    most = max(found.values(), default=0)
    if not most:
        return parent / "images" if (parent / "images").is_dir() else parent
    best = [folder for folder, number in found.items() if number == most]
    if len(best) > 1:  # images of several splits may have the same names
        split = split_of_file(json_file, root)
        named = [folder for folder in best if name_split(_below(folder, root)) == split != ALL]
        best = named or best
    return best[0]


def _below(folder: Path, root: Path) -> list[str]:
    """The names of the folders below the root, without years, as in ``train2017``."""
    parts = folder.relative_to(root).parts if folder.is_relative_to(root) else (folder.name,)
    return [part.rstrip("0123456789_- ") for part in parts]


def _folders(root: Path) -> Any:
    for folder, below, _ in os.walk(root):
        below[:] = sorted(name for name in below if not is_litter(name))
        yield Path(folder)
