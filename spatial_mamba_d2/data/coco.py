"""Reading COCO instance annotations, with every fault found before training starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from operator import mul
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.faults import (
    INACCESSIBLE,
    Fault,
    InaccessibleFileError,
    OnError,
    check_on_error,
    check_once,
    settle_faults,
)
from spatial_mamba_d2.data.images import orientation_hint, read_image
from spatial_mamba_d2.data.pixels import PixelRange

# Sections of the file -> what an entry of each is called.
SECTIONS = {"images": "image", "annotations": "annotation", "categories": "category"}
# Skipped with a warning, but no reason to refuse a data set: COCO train2017 itself has two.
HARMLESS = ("box without area",)


@dataclass(frozen=True)
class CocoDataset:
    """What `load_coco` found to be usable.

    Attributes:
        categories: (id, name) of each category, sorted by id.
        records: one dict per image, in the order of the file: `file_name` (absolute), `height`,
            `width`, `image_id`, and `annotations`, which are the dicts of the file, unchanged.
        faults: what was skipped, except boxes of width or height 0.
    """

    categories: list[tuple[int, str]]
    records: list[dict[str, Any]]
    faults: list[Fault]


def load_coco(
    json_file: str | Path,
    image_root: str | Path,
    *,
    on_error: OnError = "raise",
    check_decode: bool = False,
    value_range: PixelRange | None = None,
) -> CocoDataset:
    """Read and check a COCO instances file. Needs neither Detectron2 nor pycocotools.

    The checks run once per machine and are remembered for unchanged files.

    Args:
        json_file: in COCO's format: objects in the sections images, annotations and categories.
        image_root: the folder that `file_name` of the images starts from.
        on_error: what to do about single images, annotations or categories that are not usable.
            "raise" reports them together; "skip" skips exactly those, logs a warning with
            their number for each kind of fault, and lists them in the result. Boxes of width or
            height 0, which COCO itself has, are skipped in either case.
        check_decode: also decode every image, which finds damaged files and wrong sizes.
        value_range: see :func:`~.images.read_image`.

    Raises:
        FileNotFoundError: if `json_file` or the folder `image_root` does not exist.
        ValueError: if `json_file` is not JSON (or cut off), a section is missing, or no image is
            usable; for any other fault if `on_error` is "raise".
    """
    check_on_error(on_error)
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"image_root: no folder {image_root}")
    content = _read_sections(json_file)
    paths = [_path(image, image_root) for image in content["images"]]
    folders = _Folders()
    there = [path for path in paths if path and path in folders]
    missing = sorted({*filter(None, paths)} - {*there})
    checked = check_once(
        "coco",
        [json_file, *(there if check_decode else [])],
        [os.path.abspath(image_root), check_decode, missing, value_range],
        lambda: _find_faults(content, paths, folders, check_decode, value_range),
    )
    faults = [fault for _, fault in checked]
    rejected: dict[str, set[int]] = {section: set() for section in SECTIONS}
    for (section, position), _ in checked:
        rejected[section].add(position)

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
    for _, annotation in usable("annotations"):
        if record := records.get(annotation["image_id"]):
            record["annotations"].append(annotation)
    settle_faults(faults, on_error, where=json_file, num_usable=len(records), harmless=HARMLESS)
    return CocoDataset(
        sorted((category["id"], category["name"]) for _, category in usable("categories")),
        list(records.values()),
        [fault for fault in faults if fault.kind not in HARMLESS],
    )


def _path(image: Any, image_root: str | Path) -> str | None:
    """The file of an image, None if its entry does not say."""
    name = image.get("file_name") if isinstance(image, dict) else None
    return os.path.abspath(os.path.join(image_root, name)) if isinstance(name, str) else None


def _find_faults(
    content: dict[str, list[Any]],
    paths: Sequence[str | None],
    folders: _Folders,
    check_decode: bool,
    value_range: PixelRange | None,
) -> list[tuple[tuple[str, int], Fault]]:
    """Everything that is not usable: its section and position there, and the fault.

    Args:
        paths: the file of each image.
        folders: the files that exist.
    """
    found: list[tuple[tuple[str, int], Fault]] = []

    def reject(section: str, position: int, fault: Fault) -> None:
        name = _called(SECTIONS[section], content[section][position])
        found.append(((section, position), fault._replace(reason=f"{name}: {fault.reason}")))

    category_ids: set[int] = set()
    for position, category in enumerate(content["categories"]):
        if fault := _category_fault(category, category_ids):
            reject("categories", position, fault)
        else:
            category_ids.add(category["id"])

    # An image whose file is missing keeps its size: its annotations are no faults of their own.
    sizes: dict[int | str, tuple[int, int]] = {}
    to_decode: list[int] = []
    for position, image in enumerate(content["images"]):
        if fault := _image_fault(image, sizes):
            reject("images", position, fault)
            continue
        sizes[image["id"]] = (image["height"], image["width"])
        path = str(paths[position])
        if path in folders:
            to_decode.append(position)
        else:
            reject("images", position, Fault("missing image file", f"no file {path}"))
    if check_decode:

        def decode(position: int) -> Fault | None:
            return _decoding_fault(str(paths[position]), content["images"][position], value_range)

        with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
            for position, fault in zip(to_decode, pool.map(decode, to_decode), strict=True):
                if fault:
                    reject("images", position, fault)

    annotation_ids: set[int] = set()
    for position, annotation in enumerate(content["annotations"]):
        if fault := _annotation_fault(annotation, sizes, category_ids, annotation_ids):
            reject("annotations", position, fault)
        else:
            annotation_ids.add(annotation["id"])
    return found


def _read_sections(json_file: str | Path) -> dict[str, list[Any]]:
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"json_file: no file {json_file}") from None
    except ValueError as error:
        raise ValueError(f"{json_file}: not JSON, or cut off: {error}") from error
    for section in SECTIONS:
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(
                f"{json_file}: not in COCO's instances format, which has the lists "
                f"{', '.join(SECTIONS)}: {section} is missing"
            )
    return content


def _called(section: str, entry: Any) -> str:
    """A name for an entry of the file in messages, even if the entry is malformed."""
    if not isinstance(entry, dict):
        return f"{section} {_short(entry)}"
    name = f"{section} {entry.get('id')}"
    if "image_id" in entry:
        return f"{name} of image {entry['image_id']}"
    return f"{name} ({entry['file_name']})" if "file_name" in entry else name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _category_fault(category: Any, known: Collection[int]) -> Fault | None:
    if not isinstance(category, dict) or not (
        isinstance(category.get("id"), int) and isinstance(category.get("name"), str)
    ):
        return Fault("malformed category", f"needs an integer id and a name: {_short(category)}")
    if category["id"] in known:
        return Fault("repeated category id", "another category has this id")
    return None


def _image_fault(image: Any, known: Collection[int | str]) -> Fault | None:
    if not isinstance(image, dict) or not (
        isinstance(image.get("id"), (int, str)) and isinstance(image.get("file_name"), str)
    ):
        return Fault("malformed image", f"needs an id and a file_name: {_short(image)}")
    if image["id"] in known:
        return Fault("repeated image id", "another image has this id")
    for side in ("height", "width"):
        value = image.get(side)
        if not isinstance(value, int) or value < 1:
            return Fault("malformed image", f"{side} must be an integer above 0, got {value!r}")
    return None


class _Folders:
    """Which files exist, found by listing each folder once, which is much faster than asking."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in self._names[folder]


def _decoding_fault(
    path: str, image: dict[str, Any], value_range: PixelRange | None
) -> Fault | None:
    try:
        height, width, _ = read_image(path, value_range=value_range).shape
    except InaccessibleFileError as error:
        return Fault(INACCESSIBLE, str(error))
    except (OSError, ValueError) as error:
        return Fault("damaged image file", str(error))
    if (height, width) != (image["height"], image["width"]):
        return Fault(
            "wrong image size",
            f"{path} has height {height} and width {width}, "
            f"recorded are {image['height']} and {image['width']}"
            f"{orientation_hint(path, (image['height'], image['width']))}",
        )
    return None


def _annotation_fault(
    annotation: Any,
    sizes: dict[int | str, tuple[int, int]],
    category_ids: Collection[int],
    known: Collection[int],
) -> Fault | None:
    if not isinstance(annotation, dict) or not isinstance(annotation.get("id"), int):
        return Fault("malformed annotation", f"needs an integer id: {_short(annotation)}")
    if annotation["id"] in known:
        return Fault("repeated annotation id", "another annotation has this id")
    image_id = annotation.get("image_id")
    if not isinstance(image_id, (int, str)) or image_id not in sizes:
        return Fault("unknown image_id", f"no usable image has the id {_short(image_id)}")
    category_id = annotation.get("category_id")
    if not isinstance(category_id, int) or category_id not in category_ids:
        return Fault("unknown category_id", f"no category has the id {_short(category_id)}")
    if annotation.get("iscrowd", 0) not in (0, 1):
        return Fault("malformed annotation", f"iscrowd is {_short(annotation['iscrowd'])}")
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not _are_finite(bbox):
        return Fault("degenerate box", f"bbox must be 4 finite numbers, got {_short(bbox)}")
    if bbox[2] < 0 or bbox[3] < 0:
        return Fault("degenerate box", f"bbox {bbox} must have width and height above 0")
    if bbox[2] == 0 or bbox[3] == 0:
        return Fault("box without area", f"bbox {bbox} must have width and height above 0")
    segmentation = annotation.get("segmentation")
    if segmentation is None:  # boxes only
        return None
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, sizes[image_id])
    return _polygons_fault(segmentation)


def _are_finite(numbers: list[Any]) -> bool:
    try:
        return math.isfinite(sum(numbers))  # inf and NaN survive a sum
    except TypeError:
        return False


def _polygons_fault(polygons: Any) -> Fault | None:
    """A polygon without area is harmless if another one has some."""
    kind = "degenerate polygon"
    if not isinstance(polygons, list) or not polygons:
        return Fault(kind, f"segmentation must be polygons or RLE, got {_short(polygons)}")
    area = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or not _are_finite(polygon):
            return Fault(kind, f"a polygon must be finite numbers, got {_short(polygon)}")
        if len(polygon) < 6 or len(polygon) % 2:
            return Fault(
                kind,
                "a polygon must be 3 or more pairs of numbers, "
                f"got {len(polygon)} numbers: {_short(polygon)}",
            )
        area += _polygon_area(polygon)
    if area < 1e-3:  # square pixels; rounding can leave a little of a line
        return Fault(kind, f"the polygons enclose no area: {_short(polygons)}")
    return None


def _polygon_area(polygon: list[float]) -> float:
    """The area of [x0, y0, x1, y1, ...], in pixels."""
    x, y = polygon[0::2], polygon[1::2]
    forward = sum(map(mul, x, islice(y, 1, None))) + x[-1] * y[0]
    backward = sum(map(mul, y, islice(x, 1, None))) + y[-1] * x[0]
    return abs(forward - backward) / 2


def _rle_fault(rle: dict[str, Any], size: tuple[int, int]) -> Fault | None:
    kind = "wrong RLE"
    if rle.get("size") != list(size):
        return Fault(kind, f"its size is {_short(rle.get('size'))}, that of the image {list(size)}")
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = _decode_counts(counts)
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        return Fault(kind, f"counts must be integers from 0 on, got {_short(rle.get('counts'))}")
    pixels = size[0] * size[1]
    if sum(counts) != pixels:
        return Fault(kind, f"counts sum to {sum(counts)}, the image has {pixels} pixels")
    if not any(counts[1::2]):
        return Fault(kind, "marks no pixel")
    return None


def _decode_counts(text: str) -> list[int] | None:
    """The run lengths in a compressed RLE; None if it is not one.

    The format is that of `rleToString` in pycocotools: 5 bits a character from chr(48) on, the
    lowest first; bit 6 says that more follow, and the last one's highest bit is the sign. From the
    fourth number on, each is the difference to the one two places before. Done here because
    pycocotools decodes a string that is cut off into what the memory happens to hold.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        chunk = ord(character) - 48
        if not 0 <= chunk < 64:
            return None
        value |= (chunk & 31) << shift
        shift += 5
        if not chunk & 32:
            if chunk & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value, shift = 0, 0
    return counts if shift == 0 else None
