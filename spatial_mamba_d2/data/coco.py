"""Reading COCO instance annotations, with every fault found before training starts."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.coco_annotations import (
    EMPTY_BOX,
    LOSSES,
    REPEATED,
    AnnotationReader,
    whole_number,
)
from spatial_mamba_d2.data.coco_findings import SECTIONS, Findings, reject
from spatial_mamba_d2.data.coco_images import (
    Folders,
    Size,
    examine_images,
    find_images,
    measure_image,
)
from spatial_mamba_d2.data.coco_masks import short
from spatial_mamba_d2.data.faults import (
    Fault,
    OnError,
    check_on_error,
    check_once,
    settle_faults,
)
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.system.missing import no_such

logger = logging.getLogger(__name__)

# Skipped with a warning, but no reason to refuse a data set: COCO train2017 itself has two boxes
# without area. They are not evaluated either, although pycocotools counts them as missed objects:
# nothing can match them, and it cannot read all their masks. Files without such boxes, as COCO
# val2017, are evaluated as they are, and all other annotations in any case as pycocotools does.
HARMLESS = (EMPTY_BOX, REPEATED)
# Up to this share, crowds are what COCO means by them; above, probably what a tool makes of masks.
USUAL_CROWDS = 0.1


@dataclass(frozen=True)
class CocoDataset:
    """What `load_coco` found to be usable.

    Attributes:
        categories: (id, name) of each class, sorted by id.
        records: one dict per image, in the order of the file: `file_name` (absolute), `height`,
            `width`, `image_id`, and `annotations`: the dicts of the file, in which `id` (from 1),
            `image_id`, `category_id`, `iscrowd` (0 or 1), `bbox`, `area` and `segmentation` (if
            there is one) are what Detectron2 and pycocotools need.
        faults: what was skipped, except `HARMLESS` kinds.
        notes: what was changed while reading, and what is unusual, in a sentence each.
        is_changed: whether the records differ from what pycocotools would read from the file.
        keypoints: names of the keypoints of each category's instances, by the category's id; empty
            if the file has none.
    """

    categories: list[tuple[int, str]]
    records: list[dict[str, Any]]
    faults: list[Fault]
    notes: list[str] = field(default_factory=list)
    is_changed: bool = False
    keypoints: dict[int, list[str]] = field(default_factory=dict)


def load_coco(
    json_file: str | Path,
    image_root: str | Path,
    *,
    on_error: OnError = "raise",
    check_decode: bool = False,
    num_channels: int = 3,
    value_range: PixelRange | None = None,
) -> CocoDataset:
    """Read and check a COCO instances file. Needs neither Detectron2 nor pycocotools.

    What tools write in another way than COCO, but can be understood in one way only, is turned into
    COCO's and noted. The checks run once per machine and are remembered for unchanged files.

    Args:
        json_file: in COCO's format: objects in the sections images, annotations and categories.
        image_root: the folder that `file_name` of the images starts from.
        on_error: what to do about single images, annotations or categories that are not usable.
            "raise" reports them together; "skip" skips exactly those, logs a warning with
            their number for each kind of fault, and lists them in the result. Boxes of width or
            height 0, which COCO itself has, and exact repetitions are skipped in either case.
        check_decode: also decode every image, which finds damaged files; otherwise only the headers
            are read, for the sizes.
        num_channels, value_range: see :func:`~.images.read_image`.

    Raises:
        FileNotFoundError: if `json_file` or the folder `image_root` does not exist.
        ValueError: if `json_file` is not JSON (or cut off), a section is missing, the boxes of the
            entire file are not in COCO's format, or no image is usable; for any other fault if
            `on_error` is "raise".
    """
    check_on_error(on_error)
    if not os.path.isdir(image_root):
        raise no_such("image_root", image_root, "folder")
    content = read_sections(json_file)
    found, paths, notes = examine_coco(
        content,
        image_root,
        json_file,
        check_decode=check_decode,
        num_channels=num_channels,
        value_range=value_range,
    )
    if found["problem"]:
        raise ValueError(f"{json_file}: {found['problem']}")
    rejected: dict[str, set[int]] = {section: set() for section in SECTIONS}
    for section, position, _, _ in found["faults"]:
        rejected[section].add(position)
    for section, position, change in found["changes"]:
        content[section][position].update(change)

    def usable(section: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for position, entry in enumerate(content[section]):
            if position not in rejected[section]:
                yield position, entry

    records = {
        image["id"]: {
            "file_name": paths[position],
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for position, image in usable("images")
    }
    num_lost = 0
    for number, (_, annotation) in enumerate(usable("annotations"), start=1):
        if found["renumber"]:
            annotation["id"] = number
        if record := records.get(annotation["image_id"]):
            record["annotations"].append(annotation)
        else:
            num_lost += 1
    faults = [Fault(kind, reason) for _, _, kind, reason in found["faults"]]
    settle_faults(faults, on_error, where=json_file, num_usable=len(records), harmless=HARMLESS)
    notes += found["notes"]
    if num_lost:
        notes.append((f"{num_lost} annotations belong to images that are not used", True))
    for note, is_warning in notes:
        logger.log(logging.WARNING if is_warning else logging.INFO, "%s: %s", json_file, note)
    return CocoDataset(
        [(id_, name) for id_, name in found["categories"]],
        list(records.values()),
        [fault for fault in faults if fault.kind not in HARMLESS],
        [note for note, _ in notes],
        bool(faults or found["changes"] or found["renumber"]) or not _is_plain(json_file, content),
        {
            category["id"]: [str(name) for name in category["keypoints"]]
            for _, category in usable("categories")
            if isinstance(category.get("keypoints"), list)
        },
    )


def examine_coco(
    content: dict[str, list[Any]],
    image_root: str | Path,
    json_file: str | Path | None = None,
    *,
    check_decode: bool = False,
    num_channels: int = 3,
    value_range: PixelRange | None = None,
) -> tuple[Findings, list[str | None], list[tuple[str, bool]]]:
    """What is wrong with the content of a COCO file, the file of each image, and notes on these.

    Files that images name in another way than COCO does become their ``file_name``, in place.

    Args:
        json_file: where the content comes from; its checks are remembered. None: nowhere.
        check_decode, num_channels, value_range: see :func:`load_coco`.
    """
    folders = Folders()
    paths, notes = find_images(content["images"], image_root, folders)

    def measure(path: str) -> Size | Fault | None:
        if path not in folders:
            return None
        return measure_image(path, check_decode, num_channels, value_range)

    if json_file is None:
        return _examine(content, paths, measure), paths, notes
    there = [path for path in paths if path and path in folders]
    missing = sorted({*filter(None, paths)} - {*there})
    found = check_once(
        "coco",
        [json_file, *there],
        [os.path.abspath(image_root), check_decode, missing, num_channels, value_range],
        lambda: _examine(content, paths, measure),
    )
    return found, paths, notes


def _is_plain(json_file: str | Path, content: dict[str, Any]) -> bool:
    """Whether pycocotools reads the file, which it opens without regard to the encoding."""
    with open(json_file, "rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8" and "info" in content


def _examine(
    content: dict[str, list[Any]],
    paths: Sequence[str | None],
    measure: Callable[[str], Size | Fault | None],
) -> Findings:
    """Everything that is not usable, or has to change.

    Args:
        paths: the file of each image.
        measure: height and width of the image in a file, why it cannot be read, or None if there is
            no file.
    """
    found = Findings(faults=[], changes=[], categories=[], renumber=False, problem=None, notes=[])
    classes = _examine_categories(content["categories"], found)
    images, key = examine_images(content["images"], paths, measure, found)
    reader = AnnotationReader(images, key, classes)
    for position, annotation in enumerate(content["annotations"]):
        result = reader.read(annotation)
        if isinstance(result, Fault):
            reject(found, content, "annotations", position, result)
        elif result:
            found["changes"].append(("annotations", position, result))
    found["renumber"] = not reader.ids_are_usable
    found["problem"], unusual = reader.statistics()
    _note_annotations(reader, found, unusual)
    return found


def _note_annotations(reader: AnnotationReader, found: Findings, unusual: list[str]) -> None:
    notes = found["notes"]
    notes += [(f"{what}: {number}", what in LOSSES) for what, number in reader.counts.items()]
    notes += [(note, True) for note in unusual]
    number, crowds = reader.num_usable, reader.num_crowds
    if found["renumber"]:
        note = (
            f"annotation ids are missing, repeated, below 1 or no integers: all {number} "
            "annotations were numbered anew"
        )
        notes.append((note, False))
    if crowds:
        is_unusual = crowds > USUAL_CROWDS * number
        note = (
            f"{crowds} of {number} annotations are crowds (iscrowd 1): they neither train nor count"
        )
        if is_unusual:
            note += "; if they are single objects, as brush masks of some tools, set iscrowd to 0"
        notes.append((note, is_unusual))
    unused = [name for id_, name in found["categories"] if not reader.num_objects[id_]]
    if unused and number:
        note = (
            f"{len(unused)} of {len(found['categories'])} categories have no annotation"
            f"{' that is no crowd' if crowds else ''}: "
            f"{', '.join(map(repr, unused[:10]))}{', ...' if len(unused) > 10 else ''}"
        )
        notes.append((note, False))


def _examine_categories(entries: list[Any], found: Findings) -> dict[int, int]:
    """Id of each usable category -> id of its class, which is another one for repeated names."""
    content = {"categories": entries}
    usable: dict[int, tuple[str, str]] = {}  # id -> name, supercategory
    for position, category in enumerate(entries):
        id_ = whole_number(category.get("id")) if isinstance(category, dict) else None
        name = category.get("name") if isinstance(category, dict) else None
        if type(name) is int:  # digits, for example
            name = str(name)
        if id_ is None or not isinstance(name, str):
            reason = f"needs an integer id and a name: {short(category)}"
            reject(found, content, "categories", position, Fault("malformed category", reason))
        elif id_ in usable:
            fault = Fault("repeated category id", "another category has this id")
            reject(found, content, "categories", position, fault)
        else:
            usable[id_] = (name, str(category.get("supercategory", "")))
            if category["id"] is not id_ or category["name"] is not name:
                found["changes"].append(("categories", position, {"id": id_, "name": name}))
    number_of = Counter(name for name, _ in set(usable.values()))
    classes: dict[int, int] = {}
    first: dict[tuple[str, str], int] = {}
    for id_, label in sorted(usable.items()):
        classes[id_] = first.setdefault(label, id_)
    for id_, class_id in classes.items():
        name, group = usable[id_]
        shown = f"{name} ({group})" if number_of[name] > 1 else name
        if id_ == class_id:
            found["categories"].append((id_, shown))
            if shown != name:
                found["notes"].append((f"category {id_} has no name of its own: {shown!r}", False))
        else:
            found["notes"].append(
                (f"categories {class_id} and {id_} have the same name {name!r}: one class", True)
            )
    return classes


def read_sections(json_file: str | Path) -> dict[str, list[Any]]:
    """The content of a COCO file, in which ``images``, ``annotations``, ``categories`` are lists.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, or a section is missing.
    """
    try:
        content = read_json(json_file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"json_file: {error}") from None
    for section in SECTIONS:
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(
                f"{json_file}: not in COCO's instances format, which has the lists "
                f"{', '.join(SECTIONS)}: {section} is missing"
            )
    return content
