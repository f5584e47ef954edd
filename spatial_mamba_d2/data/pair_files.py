"""Which image file belongs to which label file.

By default as ADE20K has them, in folders of any depth; :class:`Layout` describes others::

    ROOT/images/SPLIT/NAME.jpg          any format that Pillow reads
    ROOT/annotations/SPLIT/NAME.png     as large as the image
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from spatial_mamba_d2.data.faults import Fault
from spatial_mamba_d2.data.images import SUFFIXES, files_below
from spatial_mamba_d2.data.label_maps import Pair
from spatial_mamba_d2.data.text_file import read_text_file
from spatial_mamba_d2.system.missing import no_such

logger = logging.getLogger(__name__)

_MOST_TRIED = 20  # labels, each of which is compared with every image
LABEL_WITHOUT_IMAGE = "label without image"  # the kind of fault that costs no image
TREE = "datasets/README.md shows the tree"


@dataclass(frozen=True)
class Layout:
    """Where images and labels are below the root, and how their files end.

    Attributes:
        image_folder, label_folder: with ``{split}`` for the name of the split, which is left out if
            the split is a file of names.
        image_suffix, label_suffix: what follows the name that an image and its label have in
            common, such as ``_leftImg8bit.png`` and ``_gtFine_labelIds.png``, or ``_mask`` with any
            suffix of images; "": nothing but such a suffix.
    """

    image_folder: str = "images/{split}"
    label_folder: str = "annotations/{split}"
    image_suffix: str = ""
    label_suffix: str = ""


def find_pairs(
    root: str | Path, split: str, layout: Layout | None = None, *, root_name: str = "DATASETS.ROOT"
) -> tuple[list[Pair], list[Fault]]:
    """The pairs of a split, in the order of their names, and what is wrong with the other files.

    Args:
        split: the name of a folder, or a text file in ``root`` with one name a line.
        root_name: what names ``root``, for errors.

    Raises:
        FileNotFoundError: a folder or the file of names does not exist.
        ValueError: the file of names is not text.
    """
    root, layout = Path(root), layout or Layout()
    listed = _read_names(root, split) if is_list(root, split) else None
    folders = [
        _folder(root, template, None if listed is not None else split, root_name)
        for template in (layout.image_folder, layout.label_folder)
    ]
    image_files, label_files = ({}, {}) if listed == [] else map(_files, folders)
    labels, same_labels = _by_name(label_files, layout.label_suffix)
    if folders[0] == folders[1]:  # a file is a label or an image
        taken = set(labels.values())
        image_files = {k: path for k, path in image_files.items() if path not in taken}
    images, same_images = _by_name(image_files, layout.image_suffix)
    same = {**same_labels, **same_images}
    if listed is not None:
        return _listed_pairs(root, split, listed, images, labels, layout, same)
    faults = list(same.values())
    pairs = [Pair(path, labels[name], name) for name, path in images.items() if name in labels]
    label_end = layout.label_suffix or ".png"
    faults += [
        Fault("image without label", f"{path}: no {folders[1] / name}{label_end}")
        for name, path in images.items()
        if name not in labels and name not in same
    ]
    faults += [
        Fault(LABEL_WITHOUT_IMAGE, f"{path}: no image {name} in {folders[0]}")
        for name, path in labels.items()
        if name not in images and name not in same
    ]
    if not pairs and images and labels:
        faults.append(_no_common_name(images, labels, folders))
    return pairs, faults


def is_list(root: str | Path, split: str) -> bool:
    """Whether a split is a file of names, and not a folder."""
    return split.lower().endswith(".txt") or Path(root, split).is_file()


def data_folders(root: str | Path, layout: Layout | None = None) -> list[Path]:
    """The folders that the images and the labels of all splits are in."""
    layout = layout or Layout()
    return [Path(root, *_parts(t, "")) for t in (layout.image_folder, layout.label_folder)]


def _parts(template: str, split: str) -> list[str]:
    parts = (part.replace("{split}", split) for part in Path(template).parts)
    return [part for part in parts if part]


def _folder(root: Path, template: str, split: str | None, root_name: str) -> Path:
    folder = Path(root, *_parts(template, split or ""))
    if not folder.is_dir():
        raise no_such(root_name, folder, "folder", TREE)
    return folder


def _files(folder: Path) -> dict[str, Path]:
    """Path below the folder, with ``/`` -> file."""
    return {path.relative_to(folder).as_posix(): path for path in files_below(folder)}


def _name(file: str, suffix: str) -> str | None:
    """What is left of a path without the suffix, or None if it does not end so."""
    suffix = suffix.removeprefix("*").lower()
    stem, ending = os.path.splitext(file)  # Path is ten times slower
    if suffix and _has_ending(suffix):
        end = len(suffix)
        fits = file.lower().endswith(suffix)
    else:
        end = len(suffix) + len(ending)
        fits = ending.lower() in SUFFIXES and stem.lower().endswith(suffix)
    name = file[:-end]
    return name if fits and name and not name.endswith("/") else None


def _has_ending(suffix: str) -> bool:
    return bool(os.path.splitext(f"x{suffix}")[1])  # "x": a suffix of its own has none


def _by_name(files: Mapping[str, Path], suffix: str) -> tuple[dict[str, Path], dict[str, Fault]]:
    """``{name: file}``, and a fault for each name that several files have."""
    named: dict[str, list[Path]] = {}
    other: list[Path] = []
    for file, path in files.items():
        name = _name(file, suffix)
        if name is None:
            other.append(path)
        else:
            named.setdefault(name, []).append(path)
    if other:
        logger.info(
            "not used, because of their names: %d files, the first: %s", len(other), other[0]
        )
    faults = {
        name: Fault("several files of one name", f"{', '.join(map(str, paths))}")
        for name, paths in named.items()
        if len(paths) > 1
    }
    return {name: paths[0] for name, paths in named.items() if len(paths) == 1}, faults


def _read_names(root: Path, split: str) -> list[str]:
    text = read_text_file(Path(root, split), "DATASETS.TRAIN or TEST")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _listed_pairs(
    root: Path,
    split: str,
    listed: list[str],
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    layout: Layout,
    same: Mapping[str, Fault],
) -> tuple[list[Pair], list[Fault]]:
    """The pairs that a file names, each by its name, its image's file, or both files.

    Both files are separated by a tab, a comma or blanks.
    """
    pairs: dict[str, Pair] = {}
    faults: list[Fault] = []
    name_of: dict[str, str] = {}
    if any(map(os.path.isabs, listed)):
        name_of = {os.path.abspath(path): name for name, path in images.items()}
    for line in listed:
        name = name_of.get(os.path.normpath(line)) or _stem(line, layout, images)
        pair = None
        if name in images and name in labels:
            pair = Pair(images[name], labels[name], name)
        elif len(files := _two_files(line)) == 2:
            image, label = (_listed_file(root, file) for file in files)
            if image.is_file() and label.is_file():
                below = image.relative_to(root) if image.is_relative_to(root) else image
                parts = below.with_suffix("").relative_to(below.anchor).parts
                name = "/".join(part for part in parts if part != "..")
                pair = Pair(image, label, name)
        if pair is None and name in same:
            faults.append(same[name])
        elif pair is None:
            missing = "image" if name not in images else "label"
            reason = f"{Path(root, split)}: {line!r} has no {missing}"
            faults.append(Fault(f"listed name without {missing}", reason))
        elif name in pairs:
            faults.append(Fault("name listed twice", f"{Path(root, split)}: {line!r}"))
        else:
            pairs[name] = pair
    return list(pairs.values()), faults


def _two_files(line: str) -> list[str]:
    """The parts of a line with an image and its label; with a tab, names may have blanks."""
    return line.split("\t") if "\t" in line else line.replace(",", " ").split()


def _listed_file(root: Path, file: str) -> Path:
    """A file that a list names, below the root also if it begins with ``/``, or anywhere."""
    path = Path(root, file.lstrip("/"))
    return Path(file) if os.path.isabs(file) and not path.exists() else path


def _stem(line: str, layout: Layout, images: Mapping[str, Path]) -> str:
    """The name that a line of a file of names means; it may have the image's suffix."""
    suffix = layout.image_suffix.removeprefix("*")
    if _has_ending(suffix):
        suffix = os.path.splitext(f"x{suffix}")[0][1:]
    names = [_name(line, layout.image_suffix), _name(line, ""), line]
    if suffix and line.lower().endswith(suffix.lower()):  # all but the file's ending
        names.append(line[: -len(suffix)])
    found = [name for name in names if name]
    return next((name for name in found if name in images), found[0])


def _no_common_name(
    images: Mapping[str, Path], labels: Mapping[str, Path], folders: list[Path]
) -> Fault:
    """A fault that says which keys would make pairs."""
    hint = ""
    image, label = next(iter(images)), next(iter(labels))
    for label in islice(labels, _MOST_TRIED):
        common = next((name for name in images if label.startswith(name)), None)
        if common:
            hint = f": DATASETS.LABEL_SUFFIX {labels[label].name[len(Path(common).name) :]}"
            break
    return Fault(
        "no image and label of one name",
        f"{folders[0]} has {image}, {folders[1]} has {label}; DATASETS.IMAGE_SUFFIX and "
        f"LABEL_SUFFIX say what follows the common name{hint}",
    )
