"""The images of a COCO file: their ids, their sizes, and whether the files are there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.coco_annotations import exact_image_key, image_key, whole_number
from spatial_mamba_d2.data.coco_findings import Findings, reject
from spatial_mamba_d2.data.coco_masks import short
from spatial_mamba_d2.data.faults import Fault, reading_fault
from spatial_mamba_d2.data.images import orientation_hint, read_image, read_size
from spatial_mamba_d2.data.pixels import PixelRange

Key = int | str
KeyOf = Callable[[Any], Key | None]
Size = tuple[int, int]


class Folders:
    """Which files exist, found by listing each folder once, which is much faster than asking."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in self._names[folder]


def find_images(
    entries: list[Any], image_root: str | Path, folders: Folders
) -> tuple[list[str | None], list[tuple[str, bool]]]:
    """The file of each image, None if its entry does not say, and notes as in :class:`Findings`.

    A file that its entry names in another way than COCO does becomes its ``file_name``.
    """
    paths: list[str | None] = []
    counts: Counter[str] = Counter()
    for image in entries:
        name, url = (
            image.get(key) if isinstance(image, dict) else None for key in ("file_name", "coco_url")
        )
        candidates = []
        how = ""
        if isinstance(name, str):
            candidates = [name]
            if "\\" in name:
                candidates.append(name.replace("\\", "/"))
                how = "file_name of images has backslashes, and was read with slashes"
        elif isinstance(url, str) and url:  # LVIS has no other: .../train2017/000000391895.jpg
            candidates = ["/".join(url.split("/")[-2:]), url.split("/")[-1]]
            how = "file_name of images is missing, and was taken from coco_url"
        if not candidates:
            paths.append(None)
            continue
        tried = [os.path.abspath(os.path.join(image_root, candidate)) for candidate in candidates]
        chosen = next((i for i, path in enumerate(tried) if path in folders), 0)
        paths.append(tried[chosen])
        if candidates[chosen] != name:
            image["file_name"] = candidates[chosen]
            counts[how] += 1
    return paths, [(f"{how}: {number}", False) for how, number in counts.items()]


def examine_images(
    entries: list[Any],
    paths: Sequence[str | None],
    measure: Callable[[str], Size | Fault | None],
    found: Findings,
) -> tuple[dict[Key, tuple[Key, Size]], KeyOf]:
    """Key of each image -> its id, height and width; and what the key of an ``image_id`` is.

    An image whose file is missing keeps its size: its annotations are no faults of their own.
    """
    content = {"images": entries}
    key_of, id_of = _image_ids(entries)

    candidates = [
        position
        for position, image in enumerate(entries)
        if isinstance(image, dict) and isinstance(image.get("file_name"), str)
    ]
    with ThreadPoolExecutor() as pool:  # Pillow decodes in parallel
        sizes = pool.map(lambda position: measure(str(paths[position])), candidates)
        measured = dict(zip(candidates, sizes, strict=True))

    images: dict[Key, tuple[Key, Size]] = {}
    for position, image in enumerate(entries):
        key = key_of(image.get("id")) if position in measured else None
        if key is None:
            reason = f"needs an id and a file_name: {short(image)}"
            reject(found, content, "images", position, Fault("malformed image", reason))
            continue
        if key in images:
            fault = Fault("repeated image id", "another image has this id")
            reject(found, content, "images", position, fault)
            continue
        size = _recorded_size(image, measured[position])
        if isinstance(size, Fault):
            reject(found, content, "images", position, size)
            continue
        height, width = size
        images[key] = (id_of(image["id"]), size)
        needed = {"id": images[key][0], "height": height, "width": width}
        change = {
            name: value
            for name, value in needed.items()
            if type(image.get(name)) is not type(value) or image[name] != value
        }
        if change:
            found["changes"].append(("images", position, change))
        measurement = measured[position]
        path = str(paths[position])
        if measurement is None:
            fault = Fault("missing image file", f"no file {path}")
            reject(found, content, "images", position, fault)
        elif isinstance(measurement, Fault):
            reject(found, content, "images", position, measurement)
        elif measurement != size:
            reject(found, content, "images", position, _size_fault(path, measurement, size))
    _note_images(entries, paths, found)
    return images, key_of


def _note_images(entries: list[Any], paths: Sequence[str | None], found: Findings) -> None:
    changes = [change for section, _, change in found["changes"] if section == "images"]
    for what, names in (
        ("ids of images are not of one type, and were made so", {"id"}),
        ("sizes of images are missing or no integers, and were filled in", {"height", "width"}),
    ):
        if number := sum(1 for change in changes if names & change.keys()):
            found["notes"].append((f"{what}: {number}", False))
    rejected = {position for section, position, _, _ in found["faults"] if section == "images"}
    times = Counter(path for i, path in enumerate(paths) if path and i not in rejected)
    if repeated := [path for path, number in times.items() if number > 1]:
        found["notes"].append(
            (
                f"{len(repeated)} image files belong to several entries, each of which has only a "
                f"part of the objects; the first: {repeated[0]}",
                True,
            )
        )


def _image_ids(entries: list[Any]) -> tuple[KeyOf, Callable[[Any], Key]]:
    """What identifies an image, however its id is written, and the id that it gets.

    Ids are integers, or strings if some are no numbers. They stay as they are if all are of one
    type.
    """
    raw = [image.get("id") for image in entries if isinstance(image, dict)]
    exact = {exact_image_key(id_) for id_ in raw}
    key_of: KeyOf = image_key
    if len({image_key(id_) for id_ in raw}) < len(exact):
        key_of = exact_image_key
    types = {type(id_) for id_ in raw if exact_image_key(id_) is not None}
    if types <= {int} or types <= {str}:
        return key_of, lambda id_: id_
    if all(isinstance(key_of(id_), int) for id_ in raw):
        return key_of, lambda id_: key_of(id_)  # type: ignore[return-value, unused-ignore]
    return key_of, lambda id_: str(key_of(id_))


def _recorded_size(image: dict[str, Any], measured: Size | Fault | None) -> Size | Fault:
    """Height and width in the entry of an image; if both are missing, those of the file."""
    sides = [image.get("height"), image.get("width")]
    if sides == [None, None] or sides == [0, 0]:
        if isinstance(measured, tuple) and not isinstance(measured, Fault):
            return measured
    numbers = []
    for side, value in zip(("height", "width"), sides, strict=True):
        number = whole_number(value)
        if number is None or not 1 <= number < 2**31:
            reason = f"{side} must be an integer above 0, got {value!r}"
            return Fault("malformed image", reason)
        numbers.append(number)
    return numbers[0], numbers[1]


def measure_image(
    path: str, check_decode: bool, num_channels: int, value_range: PixelRange | None
) -> Size | Fault:
    """Height and width of an image file, which is decoded or of which only the header is read."""
    try:
        if check_decode:
            height, width = read_image(path, num_channels, value_range).shape[:2]
            return height, width
        return read_size(path, num_channels, value_range)
    except (OSError, ValueError) as error:
        return reading_fault("damaged image file", error)


def _size_fault(path: str, measured: Size, recorded: Size) -> Fault:
    reason = (
        f"{path} has height {measured[0]} and width {measured[1]}, "
        f"recorded are {recorded[0]} and {recorded[1]}"
    )
    if measured == recorded[::-1]:
        reason += orientation_hint(path, recorded) or ": height and width are exchanged"
    return Fault("wrong image size", reason)
