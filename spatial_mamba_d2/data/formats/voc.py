"""Pascal VOC's XML files, one for each image, with boxes.

``difficult`` objects neither train nor count, as in VOC's own evaluation: they become crowds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from spatial_mamba_d2.data.class_file import read_class_lines
from spatial_mamba_d2.data.faults import Finding
from spatial_mamba_d2.data.formats.instance_builder import (
    SPLIT_NAMES,
    InstanceBuilder,
    name_split,
)
from spatial_mamba_d2.data.formats.records import LabelledData, UnusableDataError
from spatial_mamba_d2.data.images import SUFFIXES, files_below
from spatial_mamba_d2.data.text_file import read_text_file

_NAME_FILES = ("labels.txt", "classes.txt")
_MAX_BYTES = 50_000_000


class _Object(NamedTuple):
    name: str
    corners: tuple[float, float, float, float]
    is_difficult: bool


class _File(NamedTuple):
    path: Path
    image: Path
    size: tuple[int, int] | None
    objects: list[_Object]


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        ValueError: it is no XML, very large, or has entities, which may unpack to any size.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path}: must be smaller than {_MAX_BYTES:,} bytes")
    content = path.read_bytes()
    if b"<!ENTITY" in content or b"<!DOCTYPE" in content:
        raise ValueError(f"{path}: XML with a DOCTYPE is refused")
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not XML, or cut off: {error}") from None


def read_voc(path: Path) -> LabelledData:
    """Read all XML files below ``path``.

    Raises:
        UnusableDataError: there is none that can be read.
    """
    findings: list[Finding] = []
    files = files_below(path)
    images: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in SUFFIXES and file.parent.name not in _MASK_FOLDERS:
            images.setdefault(file.stem, []).append(file)
    read = [
        content
        for file in files
        if file.suffix.lower() == ".xml" and (content := _read_file(file, images, findings))
    ]
    if not read:
        raise UnusableDataError(f"{path}: no XML file of Pascal VOC that can be read")
    corners = [value for file in read for o in file.objects for value in o.corners[:2]]
    starts_at_0 = min(corners, default=1) <= 0
    notes = [
        "coordinates begin at 0: boxes are read as corners"
        if starts_at_0
        else "coordinates begin at 1 and include the last pixel, as in Pascal VOC"
    ]
    name_file = next((n for n in _NAME_FILES if (path / n).is_file()), None)
    names = read_class_lines(path, name_file) if name_file else None
    builder = InstanceBuilder(names)
    num_difficult = 0
    for split, annotated in _by_split(path, read, findings):
        image = builder.add_image(split, annotated.image, annotated.size)
        for name, (x1, y1, x2, y2), is_difficult in annotated.objects:
            if names is not None and name not in names:
                message = f"{annotated.path}: {name!r} is none of the names in {name_file}"
                findings.append(Finding("unknown class", str(annotated.path), message))
                continue
            if not starts_at_0:
                x1, y1 = x1 - 1, y1 - 1
            box = [x1, y1, x2 - x1, y2 - y1]
            builder.add_object(split, image, name, box=box, is_crowd=is_difficult)
            num_difficult += is_difficult
    if num_difficult:
        notes.append(f"{num_difficult} objects are difficult: they neither train nor count")
    used = {annotated.image.absolute() for annotated in read}
    for image_file in (f for group in images.values() for f in group):
        if image_file.absolute() not in used:
            message = f"{image_file}: no XML file for this image"
            findings.append(Finding("image without label", str(image_file), message))
    classes, splits = builder.build(SPLIT_NAMES)
    return LabelledData(path, "voc", "detection", classes, splits, findings, notes)


_MASK_FOLDERS = ("SegmentationClass", "SegmentationObject")


def _read_file(file: Path, images: dict[str, list[Path]], findings: list[Finding]) -> _File | None:
    try:
        root = read_xml(file)
    except (OSError, ValueError) as error:
        findings.append(Finding("unreadable label file", str(file), str(error)))
        return None
    if root.tag != "annotation":
        return None
    named = Path((root.findtext("filename") or file.stem).strip())
    candidates = images.get(file.stem, []) or images.get(named.stem, [])
    same_name = [image for image in candidates if image.name == named.name]
    image = _nearest(file, same_name or candidates) or file.with_name(named.name)
    if root.findtext("filename") and named.stem != file.stem and file.stem in images:
        message = f"{file}: filename is {named}, and there is an image {image.name}"
        findings.append(Finding("other file name", str(file), message))
    sides = [_number(root.findtext(f"size/{side}")) for side in ("height", "width")]
    size = None
    if all(sides):
        size = (int(sides[0] or 0), int(sides[1] or 0))
    objects = []
    for number, element in enumerate(root.iter("object")):
        where = f"{file}, object {number}"
        name = (element.findtext("name") or "").strip()
        corners = [_number(element.findtext(f"bndbox/{key}"))
                   for key in ("xmin", "ymin", "xmax", "ymax")]  # fmt: skip
        if not name or None in corners:
            message = f"{where}: needs a name and bndbox with four numbers"
            findings.append(Finding("malformed annotation", str(file), message))
            continue
        x1, y1, x2, y2 = (value or 0.0 for value in corners)
        if x2 < x1 or y2 < y1:
            message = f"{where}: xmax and ymax must not be below xmin and ymin, got {corners}"
            findings.append(Finding("degenerate box", str(file), message))
            continue
        difficult = (element.findtext("difficult") or "0").strip()
        objects.append(_Object(name, (x1, y1, x2, y2), difficult == "1"))
    return _File(file, image, size, objects)


def _nearest(file: Path, images: list[Path]) -> Path | None:
    """The one with the most folders in common, because several splits may have the same names."""

    def num_common(image: Path) -> int:
        return len({*file.parts[:-1]} & {*image.parts[:-1]})

    return max(images, key=num_common, default=None)


def _number(text: str | None) -> float | None:
    match = re.fullmatch(r"\s*(-?\d+(\.\d*)?)\s*", text or "")
    return float(match[1]) if match else None


def _by_split(
    path: Path, files: list[_File], findings: list[Finding]
) -> Iterator[tuple[str, _File]]:
    """By the lists in ``ImageSets/Main``, else by the names of folders."""
    by_name = {file.path.stem: file for file in files}
    lists = {}
    for split in SPLIT_NAMES:
        found = sorted(path.rglob(f"ImageSets/Main/{split}.txt"))
        if found:
            lists[split] = found[0]
    if not lists:
        for file in files:
            yield name_split(file.path.relative_to(path).parts[:-1]), file
        return
    listed = set()
    for split, source in lists.items():
        for line in read_text_file(source, "ImageSets").splitlines():
            if not line.strip():
                continue
            name = line.split()[0]
            listed.add(name)
            if name in by_name:
                yield split, by_name[name]
            else:
                message = f"{source} lists {name}, which has no XML file that can be read"
                findings.append(Finding("listed name without label", str(source), message))
    for name, file in by_name.items():
        if name not in listed:
            message = f"{file.path}: in no list of ImageSets/Main"
            findings.append(Finding("label in no split", str(file.path), message))
