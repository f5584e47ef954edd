"""YOLO's text files, a line for each object: boxes, and polygons of segmentation.

::

    ROOT/data.yaml                      path, train, val, test, names
    ROOT/images/train/x.jpg  ROOT/labels/train/x.txt      or  ROOT/train/images/  ROOT/train/labels/

A line is ``class x y width height`` (of the centre), or ``class x1 y1 x2 y2 x3 y3 ...``, all as
fractions of the image's width and height. An image without a file of labels has no objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.class_file import read_class_lines
from spatial_mamba_d2.data.faults import Finding
from spatial_mamba_d2.data.formats.instance_builder import (
    SPLIT_NAMES,
    InstanceBuilder,
    name_split,
)
from spatial_mamba_d2.data.formats.records import ALL, LabelledData, UnusableDataError
from spatial_mamba_d2.data.images import SUFFIXES, files_below, read_size
from spatial_mamba_d2.data.text_file import read_text_file
from spatial_mamba_d2.system.yaml_file import parse_yaml

_SLACK = 1e-3  # by which fractions may exceed 0 and 1, because of rounding
_NAME_FILES = ("classes.txt", "obj.names", "names.txt", "labels.txt")


def is_data_yaml(path: Path) -> bool:
    """Whether a YAML file names classes and splits as YOLO's ``data.yaml`` does."""
    try:
        content = parse_yaml(path.read_bytes(), path)
    except (OSError, ValueError):
        return path.name in ("data.yaml", "data.yml")
    return {"names", "nc"} & content.keys() != set() and {"train", "val"} & content.keys() != set()


def read_yolo(path: Path, yaml_file: Path | None) -> LabelledData:
    """Read all splits that ``yaml_file`` names, or that are folders in ``path`` if it is None.

    Raises:
        UnusableDataError: there are no names of classes, or no images.
        FileNotFoundError, ValueError: a file that names others is missing or broken.
    """
    findings: list[Finding] = []
    notes: list[str] = []
    if yaml_file is not None:
        names, sources = _read_yaml(yaml_file, findings)
    else:
        names, sources = _without_yaml(path)
    builder = InstanceBuilder(names)
    num_background = 0
    used: set[Path] = set()
    for split, files in sources.items():
        for file in files:
            label = label_file(file)
            used.add(label)
            num_background += not label.is_file()
            _read_image(builder, split, file, label, names, findings)
    folders = {label.parent for label in used}
    for stray in sorted(p for folder in folders for p in folder.glob("*.txt") if p not in used):
        if stray.name not in _NAME_FILES:
            findings.append(
                Finding("label without image", str(stray), f"{stray}: no image of this name")
            )
    if num_background:
        notes.append(f"{num_background} images have no file of labels: they have no objects")
    classes, splits = builder.build(SPLIT_NAMES)
    if not splits:
        raise UnusableDataError(f"{path}: no image that can be read in YOLO's folders")
    return LabelledData(path, "yolo", "detection", classes, splits, findings, notes)


def label_file(image: Path) -> Path:
    """Where YOLO looks for the labels of an image: ``labels`` for the last folder ``images``."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_yaml(file: Path, findings: list[Finding]) -> tuple[list[str], dict[str, list[Path]]]:
    content = parse_yaml(file.read_bytes(), file)
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise UnusableDataError(
                f"{file}: names must be numbered from 0 without gaps, got {list(names)[:10]}"
            )
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UnusableDataError(f"{file}: names must list the classes, got {names!r}")
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        raise UnusableDataError(f"{file}: names of classes must differ, got {names}")
    num_classes = content.get("nc", len(names))
    if num_classes != len(names):
        message = f"{file}: nc is {num_classes}, and there are {len(names)} names"
        findings.append(Finding("wrong number of classes", str(file), message))
    sources = {}
    for key in ("train", "val", "valid", "test"):
        if not content.get(key):
            continue
        given = content[key]
        files: list[Path] = []
        for place in given if isinstance(given, list) else [given]:
            found = _find_place(file, str(content.get("path") or ""), str(place))
            if found is None:
                message = f"{file}: {key} names {place}, which does not exist"
                findings.append(Finding("missing split", str(file), message))
            else:
                files += _images_of(found, file, findings)
        if files:
            sources[name_split([key])] = files
    return names, sources


def _find_place(yaml_file: Path, root: str, place: str) -> Path | None:
    """A folder or list of images; Roboflow writes ``../train/images`` for ``train/images``."""
    below = Path(*(part for part in Path(place).parts if part != "..")) if place else Path()
    candidates = [Path(yaml_file.parent, root, place), Path(yaml_file.parent, place)]
    if not Path(place).is_absolute():
        candidates.append(Path(yaml_file.parent, below))
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _images_of(place: Path, yaml_file: Path, findings: list[Finding]) -> list[Path]:
    if place.is_dir():
        return [file for file in files_below(place) if file.suffix.lower() in SUFFIXES]
    files = []
    for line in read_text_file(place, str(yaml_file)).splitlines():
        if not line.strip():
            continue
        named = Path(line.strip())
        candidates = [Path(place.parent, named), Path(yaml_file.parent, named)]
        found = next((c for c in candidates if c.is_file()), None)
        if found is None:
            message = f"{place} lists {named}, which does not exist"
            findings.append(Finding("missing image file", str(named), message))
        else:
            files.append(found)
    return files


def _without_yaml(path: Path) -> tuple[list[str], dict[str, list[Path]]]:
    name_file = next((path / name for name in _NAME_FILES if (path / name).is_file()), None)
    if name_file is None:
        raise UnusableDataError(
            f"{path}: looks like YOLO's labels, but names of classes are missing: data.yaml with "
            f"names, or one of {', '.join(_NAME_FILES)}"
        )
    sources: dict[str, list[Path]] = {}
    for file in files_below(path):
        if file.suffix.lower() in SUFFIXES:
            split = name_split(file.relative_to(path).parts[:-1])
            sources.setdefault(split, []).append(file)
    if ALL in sources and len(sources) > 1:
        del sources[ALL]
    return read_class_lines(path, name_file.name), sources


def _read_image(
    builder: InstanceBuilder,
    split: str,
    file: Path,
    label: Path,
    names: list[str],
    findings: list[Finding],
) -> None:
    try:
        height, width = read_size(file)
    except (OSError, ValueError) as error:
        findings.append(Finding("damaged image file", str(file), str(error)))
        return
    image = builder.add_image(split, file, (height, width))
    if not label.is_file():
        return
    try:
        lines = read_text_file(label, "labels").splitlines()
    except ValueError as error:
        findings.append(Finding("unreadable label file", str(label), str(error)))
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{label}, line {number}"
        try:
            index, shape = _read_line(line.split(), len(names))
        except _LineError as error:
            kind, reason = error.args
            findings.append(Finding(kind, str(label), f"{where}: {reason}, got {line.strip()!r}"))
            continue
        pixels = [v * (height if i % 2 else width) for i, v in enumerate(shape)]
        if len(pixels) == 4:
            x, y, w, h = pixels
            builder.add_object(split, image, names[index], box=[x - w / 2, y - h / 2, w, h])
        else:
            builder.add_object(split, image, names[index], mask=[pixels])


class _LineError(Exception):
    """Kind and reason of a line that cannot be used."""


def _read_line(words: list[str], num_classes: int) -> tuple[int, list[float]]:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise _LineError("malformed label line", "must be numbers") from None
    if not all(map(math.isfinite, numbers)):
        raise _LineError("malformed label line", "must be finite numbers")
    index, *shape = numbers
    if len(shape) != 4 and (len(shape) < 6 or len(shape) % 2):
        raise _LineError(
            "malformed label line", "must be a class and 4 numbers, or 3 or more points"
        )
    if not index.is_integer() or not 0 <= index < num_classes:
        raise _LineError("unknown class", f"the class must be 0..{num_classes - 1}")
    if len(shape) == 4 and min(shape[2:]) <= 0:
        raise _LineError("box without area", "width and height must be above 0")
    if not _are_fractions(shape):
        raise _LineError("coordinates are no fractions", "coordinates must be 0..1")
    return int(index), shape


def _are_fractions(shape: Iterable[Any]) -> bool:
    return all(-_SLACK <= value <= 1 + _SLACK for value in shape)
