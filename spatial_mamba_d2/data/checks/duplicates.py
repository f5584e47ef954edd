"""Images that are equal or nearly so, within a split and between splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from spatial_mamba_d2.data.checks.image_facts import THUMB_PX, ImageFacts
from spatial_mamba_d2.data.faults import Finding

# Of 240 differences between neighbours in the thumbnail, so many may have another sign. Photos of
# COCO, resized and re-encoded, have at most 35; two different ones at least 79.
_MAX_BITS = 40
# Correlation of the thumbnails' grey values; of different photos it is below 0.75.
_LEAST_CORRELATION = 0.985
_LEAST_CONTRAST = 4.0  # of images that have something to compare, in grey values
_MAX_COMPARED = 20_000  # images of which all pairs are compared
_BLOCK = 512


def find_duplicates(
    files_of: Mapping[str, Sequence[Path]], facts: Mapping[Path, ImageFacts]
) -> Iterator[tuple[bool, str, Path, str, Path]]:
    """Whether they are equal byte for byte; split and file of each of two images.

    Each image comes at most once as the second one, next to the first that it repeats.
    """
    listed = [(split, file) for split, files in files_of.items()
              for file in dict.fromkeys(files) if file in facts]  # fmt: skip
    first: dict[str, tuple[str, Path]] = {}
    distinct = []
    for split, file in listed:
        digest = facts[file].digest
        if digest in first:
            if first[digest] != (split, file):
                yield True, *first[digest], split, file
        else:
            first[digest] = (split, file)
            distinct.append((split, file))
    visible = [item for item in distinct if facts[item[1]].contrast >= _LEAST_CONTRAST]
    for a, b in _similar([facts[file] for _, file in visible[:_MAX_COMPARED]]):
        yield False, *visible[a], *visible[b]


def _similar(facts: Sequence[ImageFacts]) -> Iterator[tuple[int, int]]:
    """Positions of two similar images, for each second one the first of them."""
    if len(facts) < 2:
        return
    thumbs = np.stack([np.frombuffer(bytes.fromhex(f.thumb), np.uint8) for f in facts])
    shape = np.array([f.width / f.height for f in facts])
    grey = thumbs.reshape(-1, THUMB_PX, THUMB_PX).astype(np.int16)
    signs = (grey[:, :, 1:] > grey[:, :, :-1]).reshape(len(facts), -1)
    bits = np.packbits(signs, axis=1)
    count = np.array([bin(value).count("1") for value in range(256)], np.uint8)
    normal = thumbs.astype(np.float32)
    normal -= normal.mean(axis=1, keepdims=True)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    partner = np.full(len(facts), -1)
    for start in range(0, len(facts), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(facts)))
        correlation = normal[block] @ normal.T  # [B, N]
        rows, columns = np.nonzero(correlation >= _LEAST_CORRELATION)
        rows += start
        for a, b in zip(rows.tolist(), columns.tolist(), strict=True):
            if a >= b or partner[b] >= 0:
                continue
            is_close = count[bits[a] ^ bits[b]].sum() <= _MAX_BITS
            if is_close and abs(shape[a] - shape[b]) <= 0.05 * shape[a]:
                partner[b] = a
                yield a, b


def check_duplicates(
    files_of: Mapping[str, Sequence[Path]],
    facts: Mapping[Path, ImageFacts],
    label_of: Mapping[Path, str],
) -> list[Finding]:
    """Findings about pairs of images.

    Args:
        label_of: a word for the label of an image, where equal images must have equal ones.
    """
    found = []
    for equal, split, file, other_split, other in find_duplicates(files_of, facts):
        same = "the same image" if equal else "nearly the same image"
        kind = "duplicate images" if equal else "similar images"
        where = ""
        if split != other_split:
            kind += " in two splits"
            where = f": {other_split} leaks into {split}"
        labels = label_of.get(file), label_of.get(other)
        if labels[0] != labels[1]:
            kind = "one image with different labels"
            where += f", with the labels {labels[0]!r} and {labels[1]!r}"
        message = f"{other} ({other_split}) is {same} as {file} ({split}){where}"
        found.append(Finding(kind, str(other), message))
    return found
