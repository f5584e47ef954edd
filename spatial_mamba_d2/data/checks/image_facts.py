"""What the checks need of each image file, from one look at it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from spatial_mamba_d2.data.faults import Fault, Finding, check_once, reading_fault
from spatial_mamba_d2.data.images import naming_file, read_image
from spatial_mamba_d2.data.pixels import read_layout

THUMB_PX = 16
_TYPE_OF_START = {
    b"\xff\xd8\xff": (".jpg", ".jpeg"),
    b"\x89PNG": (".png",),
    b"BM": (".bmp",),
    b"II*\x00": (".tif", ".tiff"),
    b"MM\x00*": (".tif", ".tiff"),
}
_BLANK_STD = 1.0  # of all pixels, in grey values


class ImageFacts(NamedTuple):
    """One image.

    Attributes:
        digest: of the file's bytes.
        height, width: upright.
        orientation: as in EXIF.
        thumb: grey values of :data:`THUMB_PX` squared pixels, in hexadecimal digits.
        contrast: standard deviation of the grey values.
        red_less_blue: mean over the image; and of the upper third less that of the lower third.
        wrong_suffix: the suffix that the content should have, or "".
    """

    digest: str
    height: int
    width: int
    orientation: int
    thumb: str
    contrast: float
    red_less_blue: tuple[float, float]
    wrong_suffix: str


def read_facts(files: Sequence[Path]) -> dict[Path, ImageFacts | Fault]:
    """Decode every file, in threads; remembered as long as the files are unchanged."""
    existing = [file for file in dict.fromkeys(files) if file.is_file()]

    def compute() -> dict[str, Any]:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(_read, existing))
        return {
            "facts": [None if isinstance(f, Fault) else list(f) for f in found],
            "faults": [[i, *f] for i, f in enumerate(found) if isinstance(f, Fault)],
        }

    content = check_once("image_facts", existing, [], compute)
    facts: dict[Path, ImageFacts | Fault] = {}
    for file, values in zip(existing, content["facts"], strict=True):
        if values is not None:
            facts[file] = ImageFacts(*values)
    for index, kind, reason in content["faults"]:
        facts[existing[index]] = Fault(kind, reason)
    return facts


def _read(file: Path) -> ImageFacts | Fault:
    try:
        image = read_image(file)
        with naming_file("image", file), file.open("rb") as opened:
            orientation = read_layout(opened).orientation
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        return reading_fault("damaged image file", error)
    height, width = image.shape[:2]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    thumb = cv2.resize(grey, (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA)
    factor = max(1, min(height, width) // (4 * THUMB_PX))
    small = image[::factor, ::factor]
    difference = small[..., 0].astype(np.float32) - small[..., 2]
    third = max(1, small.shape[0] // 3)
    vertical = float(difference[:third].mean() - difference[-third:].mean())
    return ImageFacts(
        hashlib.blake2b(content, digest_size=16).hexdigest(),
        height,
        width,
        orientation,
        thumb.tobytes().hex(),
        float(grey.std()),
        (float(difference.mean()), vertical),
        _wrong_suffix(file, content),
    )


def _wrong_suffix(file: Path, content: bytes) -> str:
    for start, suffixes in _TYPE_OF_START.items():
        if content.startswith(start):
            return "" if file.suffix.lower() in suffixes else suffixes[0]
    return ""


# Images longer than that, or with a shorter side, are rarely meant.
_LONGEST_SHAPE, _SHORTEST_PX = 20, 8
# How many images the colours of all must be judged by, and standard errors that convince.
_LEAST_IMAGES, _CONVINCING = 20, 3.0
_LEAST_CAST = 6.0  # of red less blue, in grey values


def check_files(facts: dict[Path, ImageFacts | Fault]) -> list[Finding]:
    """Findings about single files."""
    found = []
    for file, fact in facts.items():
        name = str(file)
        if isinstance(fact, Fault):
            found.append(Finding(fact.kind, name, fact.reason))
            continue
        long_px, short_px = max(fact.height, fact.width), min(fact.height, fact.width)
        if fact.contrast < _BLANK_STD:
            found.append(Finding("blank image", name, f"{file}: all pixels have one colour"))
        if long_px > _LONGEST_SHAPE * short_px or short_px < _SHORTEST_PX:
            message = f"{file}: is {fact.width} x {fact.height} pixels"
            found.append(Finding("extreme image shape", name, message))
        if fact.wrong_suffix:
            message = f"{file}: is a {fact.wrong_suffix[1:]} file by its content"
            found.append(Finding("wrong file suffix", name, message))
        if fact.orientation in (2, 3, 4) or (fact.orientation > 4 and long_px == short_px):
            message = (
                f"{file}: EXIF orientation {fact.orientation} turns or mirrors the image, and its "
                "size does not tell whether the labels are turned too"
            )
            found.append(Finding("ambiguous orientation", name, message))
    return found


def check_colors(facts: dict[Path, ImageFacts | Fault], path: Path) -> list[Finding]:
    """Whether red and blue are exchanged in all images.

    In photos red exceeds blue on average, and less so in the upper part, where the sky is. If both
    are the other way round, by several standard errors, the channels are probably exchanged.
    """
    values = np.array(
        [f.red_less_blue for f in facts.values() if isinstance(f, ImageFacts)], np.float64
    ).reshape(-1, 2)
    values = values[np.abs(values).max(axis=1) > 0.5]  # grey images say nothing
    if len(values) < _LEAST_IMAGES:
        return []
    mean = values.mean(axis=0)
    errors = values.std(axis=0) / np.sqrt(len(values))
    cast, slope = mean / np.maximum(errors, 1e-9)
    if mean[0] < -_LEAST_CAST and cast < -_CONVINCING and slope > _CONVINCING / 2:
        message = (
            f"{path}: blue exceeds red by {-mean[0]:.1f} on average, and more so in the lower "
            "part of images: the channels may be in the order BGR"
        )
        return [Finding("red and blue exchanged", str(path), message)]
    return []


def check_names(files: Sequence[Path]) -> list[Finding]:
    """Images of one folder whose names differ only in capitals or in their suffix."""
    named: dict[tuple[Path, str], list[Path]] = {}
    for file in dict.fromkeys(files):
        named.setdefault((file.parent, file.stem.casefold()), []).append(file)
    return [
        Finding("names that clash", str(clashing[0]), ", ".join(map(str, clashing)))
        for clashing in named.values()
        if len(clashing) > 1
    ]
