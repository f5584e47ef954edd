"""Reading COCO instance annotations, with every fault found before training starts."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from operator import mul
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

SECTIONS = ("images", "annotations", "categories")
# Left out with a warning, but no reason to refuse a data set: COCO train2017 itself has two.
HARMLESS = ("box without area",)
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class CocoDataset:
    """What `load_coco` found to be usable.

    Attributes:
        categories: (id, name) of each category, sorted by id.
        records: one dict per image, in the order of the file: `file_name` (absolute), `height`,
            `width`, `image_id`, and `annotations`, which are the dicts of the file, unchanged.
        problems: one line for each thing left out, but for boxes of width or height 0.
    """

    categories: list[tuple[int, str]]
    records: list[dict[str, Any]]
    problems: list[str]


class _Fault(NamedTuple):
    """Why something is not usable: in general (to count by), and in this case."""

    kind: str
    reason: str


def load_coco(
    json_file: str | Path,
    image_root: str | Path,
    *,
    on_error: Literal["raise", "skip"] = "raise",
    check_decode: bool = False,
) -> CocoDataset:
    """Read and check a COCO instances file. Needs neither Detectron2 nor pycocotools.

    Args:
        json_file: in COCO's format: objects in the sections images, annotations and categories.
        image_root: the folder that `file_name` of the images starts from.
        on_error: what to do about single images, annotations or categories that are not usable.
            "raise" reports them together; "skip" leaves out exactly those, logs a warning with
            their number for each kind of fault, and lists them in the result. Boxes of width or
            height 0, which COCO itself has, are skipped in either case.
        check_decode: also decode every image, which finds damaged files and wrong sizes.

    Raises:
        FileNotFoundError: if `json_file` or the folder `image_root` does not exist.
        ValueError: if `json_file` is not JSON (or cut off), lacks a section, or has no usable
            image; for any other fault if `on_error` is "raise".
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"image_root: no folder {image_root}")
    content = _read_sections(json_file)
    faults: dict[str, list[str]] = {}  # kind -> one line for each case

    def reject(what: str, fault: _Fault) -> None:
        faults.setdefault(fault.kind, []).append(f"{json_file}: {what}: {fault.reason}")

    names: dict[int, str] = {}
    for category in content["categories"]:
        if fault := _category_fault(category, names):
            reject(_called("category", category), fault)
        else:
            names[category["id"]] = category["name"]

    # An image whose file is missing keeps its size: its annotations are no faults of their own.
    sizes: dict[int | str, tuple[int, int]] = {}
    records: dict[int | str, dict[str, Any]] = {}
    folders = _Folders()
    for image in content["images"]:
        if fault := _image_fault(image, sizes):
            reject(_called("image", image), fault)
            continue
        image_id = image["id"]
        sizes[image_id] = (image["height"], image["width"])
        path = os.path.abspath(os.path.join(image_root, image["file_name"]))
        if path in folders:
            records[image_id] = {
                "file_name": path,
                "height": image["height"],
                "width": image["width"],
                "image_id": image_id,
                "annotations": [],
            }
        else:
            reject(_called("image", image), _Fault("missing image file", f"no file {path}"))
    if check_decode:
        for image_id, fault in _undecodable(records.values()):
            reject(f"image {image_id}", fault)
            del records[image_id]

    annotation_ids: set[int] = set()
    for annotation in content["annotations"]:
        if fault := _annotation_fault(annotation, sizes, names, annotation_ids):
            reject(_called("annotation", annotation), fault)
            continue
        annotation_ids.add(annotation["id"])
        if record := records.get(annotation["image_id"]):
            record["annotations"].append(annotation)

    problems = [x for kind, lines in faults.items() if kind not in HARMLESS for x in lines]
    if not records:
        raise ValueError(f"{json_file}: no usable image{_listing(problems)}")
    if problems and on_error == "raise":
        raise ValueError(
            f"{json_file}: problems found: {len(problems)}. Correct them, or leave out what they "
            f"concern with DATASETS.ON_ERROR skip{_listing(problems)}"
        )
    for kind, lines in faults.items():
        logger.warning("Left out for %s: %d. The first: %s", kind, len(lines), lines[0])
    return CocoDataset(sorted(names.items()), list(records.values()), problems)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file, turned upright as its EXIF data say, into uint8 RGB [H, W, 3].

    Pillow does it because OpenCV takes a truncated JPEG for a whole one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not an image, or is damaged or cut off.
    """
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file {path}") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"image file {path} cannot be decoded: {error}") from error


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
    """A name for an entry of the file, good for messages even if the entry is not."""
    if not isinstance(entry, dict):
        return f"{section} {_short(entry)}"
    name = f"{section} {entry.get('id')}"
    if "image_id" in entry:
        return f"{name} of image {entry['image_id']}"
    return f"{name} ({entry['file_name']})" if "file_name" in entry else name


def _listing(problems: list[str]) -> str:
    """The first problems, one a line, to be put behind a sentence."""
    lines = problems[:SHOWN_PROBLEMS]
    if len(problems) > len(lines):
        lines.append(f"and {len(problems) - len(lines)} more")
    return "".join(f"\n  {line}" for line in lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _category_fault(category: Any, known: Collection[int]) -> _Fault | None:
    if not isinstance(category, dict) or not (
        isinstance(category.get("id"), int) and isinstance(category.get("name"), str)
    ):
        return _Fault("malformed category", f"needs an integer id and a name: {_short(category)}")
    if category["id"] in known:
        return _Fault("repeated category id", "another category has this id")
    return None


def _image_fault(image: Any, known: Collection[int | str]) -> _Fault | None:
    if not isinstance(image, dict) or not (
        isinstance(image.get("id"), (int, str)) and isinstance(image.get("file_name"), str)
    ):
        return _Fault("malformed image", f"needs an id and a file_name: {_short(image)}")
    if image["id"] in known:
        return _Fault("repeated image id", "another image has this id")
    for side in ("height", "width"):
        value = image.get(side)
        if not isinstance(value, int) or value < 1:
            return _Fault("malformed image", f"{side} must be an integer above 0, got {value!r}")
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


def _undecodable(records: Iterable[dict[str, Any]]) -> list[tuple[int | str, _Fault]]:
    """The ids of the images that cannot be used, and why."""

    def fault(record: dict[str, Any]) -> _Fault | None:
        try:
            height, width, _ = read_image(record["file_name"]).shape
        except (OSError, ValueError) as error:
            return _Fault("damaged image file", str(error))
        if (height, width) != (record["height"], record["width"]):
            return _Fault(
                "wrong image size",
                f"{record['file_name']} has height {height} and width {width}, "
                f"recorded are {record['height']} and {record['width']}",
            )
        return None

    records = list(records)
    with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
        found = list(pool.map(fault, records))
    return [(r["image_id"], f) for r, f in zip(records, found, strict=True) if f]


def _annotation_fault(
    annotation: Any,
    sizes: dict[int | str, tuple[int, int]],
    category_ids: Collection[int],
    known: Collection[int],
) -> _Fault | None:
    if not isinstance(annotation, dict) or not isinstance(annotation.get("id"), int):
        return _Fault("malformed annotation", f"needs an integer id: {_short(annotation)}")
    if annotation["id"] in known:
        return _Fault("repeated annotation id", "another annotation has this id")
    image_id = annotation.get("image_id")
    if not isinstance(image_id, (int, str)) or image_id not in sizes:
        return _Fault("unknown image_id", f"no usable image has the id {_short(image_id)}")
    category_id = annotation.get("category_id")
    if not isinstance(category_id, int) or category_id not in category_ids:
        return _Fault("unknown category_id", f"no category has the id {_short(category_id)}")
    if annotation.get("iscrowd", 0) not in (0, 1):
        return _Fault("malformed annotation", f"iscrowd is {_short(annotation['iscrowd'])}")
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not _are_finite(bbox):
        return _Fault("degenerate box", f"bbox must be 4 finite numbers, got {_short(bbox)}")
    if bbox[2] < 0 or bbox[3] < 0:
        return _Fault("degenerate box", f"bbox {bbox} must have width and height above 0")
    if bbox[2] == 0 or bbox[3] == 0:
        return _Fault("box without area", f"bbox {bbox} must have width and height above 0")
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


def _polygons_fault(polygons: Any) -> _Fault | None:
    """One polygon without area does no harm beside another that has some."""
    kind = "degenerate polygon"
    if not isinstance(polygons, list) or not polygons:
        return _Fault(kind, f"segmentation must be polygons or RLE, got {_short(polygons)}")
    area = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or not _are_finite(polygon):
            return _Fault(kind, f"a polygon must be finite numbers, got {_short(polygon)}")
        if len(polygon) < 6 or len(polygon) % 2:
            return _Fault(
                kind,
                "a polygon must be 3 or more pairs of numbers, "
                f"got {len(polygon)} numbers: {_short(polygon)}",
            )
        area += _polygon_area(polygon)
    if area < 1e-3:  # square pixels; rounding can leave a little of a line
        return _Fault(kind, f"the polygons enclose no area: {_short(polygons)}")
    return None


def _polygon_area(polygon: list[float]) -> float:
    """The area of [x0, y0, x1, y1, ...], in pixels."""
    x, y = polygon[0::2], polygon[1::2]
    forward = sum(map(mul, x, islice(y, 1, None))) + x[-1] * y[0]
    backward = sum(map(mul, y, islice(x, 1, None))) + y[-1] * x[0]
    return abs(forward - backward) / 2


def _rle_fault(rle: dict[str, Any], size: tuple[int, int]) -> _Fault | None:
    kind = "wrong RLE"
    if rle.get("size") != list(size):
        return _Fault(
            kind, f"its size is {_short(rle.get('size'))}, that of the image {list(size)}"
        )
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = _decode_counts(counts)
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        return _Fault(kind, f"counts must be integers from 0 on, got {_short(rle.get('counts'))}")
    pixels = size[0] * size[1]
    if sum(counts) != pixels:
        return _Fault(kind, f"counts sum to {sum(counts)}, the image has {pixels} pixels")
    if not any(counts[1::2]):
        return _Fault(kind, "marks no pixel")
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
