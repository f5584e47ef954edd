"""Checks of label maps, and of images with a class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spatial_mamba_d2.data.ade20k import examine_pairs
from spatial_mamba_d2.data.checks.report import SplitCounts
from spatial_mamba_d2.data.faults import Fault, Finding
from spatial_mamba_d2.data.imagenet import ClassifiedImage
from spatial_mamba_d2.data.label_format import LabelFormat
from spatial_mamba_d2.data.label_maps import Pair, read_label

# Different rows of a label map that two images have by copying, and not because it is simple.
_DETAILED_ROWS = 8


def check_label_maps(
    pairs: Sequence[Pair], labels: LabelFormat
) -> tuple[list[Finding], SplitCounts, list[Pair]]:
    """Findings of a split, its counts, and the pairs that are usable."""
    content = examine_pairs(pairs, labels)
    found = []
    broken = set()
    for index, kind, reason in content["faults"]:
        broken.add(index)
        file = pairs[index].image if kind == "unreadable image file" else pairs[index].label
        found.append(Finding(kind, str(file), reason))
    usable = [pair for index, pair in enumerate(pairs) if index not in broken]
    digests: dict[str, Path] = {}
    for pair in usable:
        indices = labels.to_indices(read_label(pair.label, labels))
        present = np.unique(indices)
        if (present == labels.ignore).all():
            message = f"{pair.label}: every pixel is ignored"
            found.append(Finding("label map without a class", str(pair.label), message))
        elif len(np.unique(indices, axis=0)) >= _DETAILED_ROWS:
            digest = hashlib.blake2b(indices.tobytes() + str(indices.shape).encode()).hexdigest()
            other = digests.setdefault(digest, pair.label)
            if other != pair.label and not _same_bytes(pair, other, usable):
                message = f"{pair.label} is the same as {other}, and their images differ"
                found.append(Finding("one label map of two images", str(pair.label), message))
    counts = SplitCounts(
        num_images=len(usable),
        num_objects=sum(content["pixels"][: labels.num_classes]),
        by_class=content["pixels"][: labels.num_classes],
        images_by_class=content["images"][: labels.num_classes],
    )
    return found, counts, usable


def _same_bytes(pair: Pair, other_label: Path, pairs: Sequence[Pair]) -> bool:
    other = next(p.image for p in pairs if p.label == other_label)
    return pair.image.read_bytes() == other.read_bytes()


def check_classes(
    samples: Sequence[ClassifiedImage], names: Sequence[str], broken: dict[Path, Fault]
) -> tuple[SplitCounts, list[ClassifiedImage]]:
    """Counts of a split, and the images that are usable."""
    usable = [sample for sample in samples if sample.path not in broken]
    by_class = [0] * len(names)
    for sample in usable:
        by_class[sample.target] += 1
    counts = SplitCounts(len(usable), len(usable), by_class, list(by_class))
    return counts, usable
