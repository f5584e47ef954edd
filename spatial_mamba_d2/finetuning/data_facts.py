"""What settings depend on, from the data: sizes of images and objects, shares of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.ade20k import examine_pairs
from spatial_mamba_d2.data.formats import Instances, LabelledData
from spatial_mamba_d2.data.imagenet import ClassifiedImage
from spatial_mamba_d2.data.images import read_size
from spatial_mamba_d2.data.label_maps import Pair

_SAMPLE = 300  # images that are looked at


@dataclass(frozen=True)
class DataFacts:
    """Of the training images.

    Attributes:
        num_images, num_val: of both splits.
        num_classes: of the data.
        short_px, long_px: medians of the sides of the images.
        object_px: the side of which a tenth of the objects are smaller; None without objects.
        largest_share: of the pixels or images that the most frequent class has.
    """

    num_images: int
    num_val: int
    num_classes: int
    short_px: int
    long_px: int
    object_px: float | None
    largest_share: float


def measure_data(data: LabelledData) -> DataFacts:
    """Raises ValueError if no training image can be read."""
    files = data.image_files("train")
    sizes = _sizes(files[:: max(1, len(files) // _SAMPLE)])
    if not sizes:
        raise ValueError(
            f"{data.path}: no training image can be read; tools/check_data.py says why"
        )
    short_px, long_px = (int(np.median([pick(size) for size in sizes])) for pick in (min, max))
    part = data.splits["train"]
    object_px, counts = None, [1]
    if isinstance(part, Instances):
        boxes = [a["bbox"] for a in part.content["annotations"]
                 if isinstance(a, dict) and isinstance(a.get("bbox"), list)
                 and len(a["bbox"]) == 4]  # fmt: skip
        sides = [float(b[2] * b[3]) ** 0.5 for b in boxes if _is_box(b)]
        object_px = float(np.percentile(sides, 10)) if sides else None
    elif data.task == "segmentation" and data.labels is not None:
        pairs = [pair for pair in part if isinstance(pair, Pair)]
        chosen = pairs[:: max(1, len(pairs) // _SAMPLE)]
        counts = examine_pairs(chosen, data.labels)["pixels"][: len(data.classes)]
    else:
        targets = [item.target for item in part if isinstance(item, ClassifiedImage)]
        counts = np.bincount(targets, minlength=1).tolist()
    share = max(counts) / max(1, sum(counts))
    num_val = len(data.image_files("val"))
    num_classes = len(set(data.classes))
    return DataFacts(len(files), num_val, num_classes, short_px, long_px, object_px, share)


def _sizes(files: Sequence[Path]) -> list[tuple[int, int]]:
    sizes = []
    for file in files:
        try:
            sizes.append(read_size(file))
        except (OSError, ValueError):
            continue  # which the training reports, or skips
    return sizes


def _is_box(box: Sequence[Any]) -> bool:
    return all(isinstance(v, (int, float)) for v in box) and min(box[2:]) > 0
