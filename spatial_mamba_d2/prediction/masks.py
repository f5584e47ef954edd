"""Masks in frames of any size: bitmaps of the part that is not empty, runs, COCO's RLE, polygons.

A frame of 20,000 x 20,000 pixels cannot hold a bitmap for each object. So a mask is a bitmap of
the object's own rectangle, or the runs of its pixels; both know where in the frame they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# COCO's RLE: {"size": [H, W], "counts": bytes}, runs of 0 and 1 in column-major order.
Rle = dict[str, Any]
_MAX_FRAME_PX = 2**32 - 1  # pycocotools counts in 32 bits
_GROUP_PX = 2**22  # of bitmaps that are converted together


class Crop(NamedTuple):
    """The rectangle of a mask that has all of its pixels.

    Attributes:
        top, left: of the rectangle in its frame, in pixels.
        bitmap: ``bool[h, w]``.
    """

    top: int
    left: int
    bitmap: np.ndarray

    @property
    def bottom(self) -> int:
        return self.top + self.bitmap.shape[0]

    @property
    def right(self) -> int:
        return self.left + self.bitmap.shape[1]

    def within(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """The bitmap's part in a rectangle of the frame; may be empty."""
        rows = slice(max(top - self.top, 0), max(bottom - self.top, 0))
        return self.bitmap[rows, max(left - self.left, 0) : max(right - self.left, 0)]


def encode_bitmap(mask: np.ndarray) -> Rle:
    """``bool[H, W]`` -> RLE."""
    return _coco_mask().encode(np.asfortranarray(mask, dtype=np.uint8))


def runs_of_crops(crops: Sequence[Crop], height: int) -> list[np.ndarray]:
    """``int64[N, 2]`` for each mask: first pixel and the one after the last of each run.

    Pixels are numbered as in COCO's RLE: down the columns of a frame of ``height`` rows.
    """
    runs: list[np.ndarray] = []
    for group in _groups([crop.bitmap.size for crop in crops]):
        runs += _runs_of_group(crops[group], height)
    return runs


def _runs_of_group(crops: Sequence[Crop], height: int) -> list[np.ndarray]:
    tops, lefts, heights, widths = np.array(
        [(c.top, c.left, *c.bitmap.shape) for c in crops], np.int64
    ).T
    # One after the other, column by column, with a zero before the first and after each column.
    offsets = np.cumsum([1, *(widths * (heights + 1))])
    flat = np.zeros(offsets[-1], np.int8)
    for crop, offset, end in zip(crops, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        columns = crop.bitmap.T
        flat[offset:end].reshape(columns.shape[0], columns.shape[1] + 1)[:, :-1] = columns
    steps = np.diff(flat)
    starts, ends = (np.flatnonzero(steps == step) + 1 for step in (1, -1))
    owners = np.searchsorted(offsets, starts, side="right") - 1
    columns, rows = np.divmod(starts - offsets[owners], heights[owners] + 1)
    firsts = (columns + lefts[owners]) * height + rows + tops[owners]
    together = np.stack([firsts, firsts + ends - starts], axis=1)
    apart = np.split(together, np.searchsorted(owners, np.arange(1, len(crops))))
    # Where a mask has all rows of its frame, a run may go on at the top of the next column.
    return [
        runs if rows < height else _joined(runs)
        for runs, rows in zip(apart, heights.tolist(), strict=True)
    ]


def _groups(sizes: Sequence[int]) -> Iterator[slice]:
    """Neighbouring bitmaps that have up to :data:`_GROUP_PX` pixels together, but at least one."""
    first, total = 0, 0
    for index, number in enumerate(sizes):
        if index > first and total + number > _GROUP_PX:
            yield slice(first, index)
            first, total = index, 0
        total += number
    if sizes:
        yield slice(first, len(sizes))


def join_runs(runs: Sequence[np.ndarray]) -> np.ndarray:
    """The runs of the union of several masks; see :func:`runs_of_crops`."""
    if len(runs) == 1:
        return runs[0]
    together = np.concatenate(runs)
    return _joined(together[np.argsort(together[:, 0], kind="stable")])


def _joined(runs: np.ndarray) -> np.ndarray:
    """Runs that are sorted by their first pixels -> runs that are apart."""
    if not len(runs):
        return runs
    ends = np.maximum.accumulate(runs[:, 1])
    is_first = np.concatenate([[True], runs[1:, 0] > ends[:-1]])
    is_last = np.concatenate([is_first[1:], [True]])
    return np.stack([runs[is_first, 0], ends[is_last]], axis=1)


def num_pixels(runs: np.ndarray) -> int:
    return int((runs[:, 1] - runs[:, 0]).sum())


def encode_runs(runs: np.ndarray, size: tuple[int, int]) -> Rle:
    """Runs, sorted and apart -> RLE.

    Args:
        size: height and width of the frame.

    Raises:
        ValueError: the frame has 2^32 pixels or more, which COCO's RLE cannot count.
    """
    height, width = size
    if height * width > _MAX_FRAME_PX:
        raise ValueError(
            f"image_size must have fewer than 2^32 pixels for masks as RLE, got {height} x {width}"
        )
    edges = np.concatenate([[0], runs.ravel(), [height * width]])
    counts = np.diff(edges)
    if counts[-1] == 0 and len(counts) > 1:
        counts = counts[:-1]
    plain = {"counts": counts.tolist(), "size": [height, width]}
    return _coco_mask().frPyObjects(plain, height, width)


def encode_crop(crop: np.ndarray, top: int, left: int, size: tuple[int, int]) -> Rle:
    """The RLE of a mask that is empty outside of a crop, without a map of the image's size.

    Args:
        crop: ``bool[h, w]``.
        top, left: of the crop in the image.
        size: height and width of the image.
    """
    return encode_runs(runs_of_crops([Crop(top, left, crop)], size[0])[0], size)


def paste_rle(mask: Tensor, box: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Rle:
    """The RLE of a mask's probabilities, pasted into a box of an image, as Detectron2 does it.

    Args:
        mask: ``float[M, M]``, on the CPU.
        box: ``float[4]``: x0, y0, x1, y1 in pixels, on the CPU.
        size: height and width of the image.
        threshold: lowest probability of the object.
    """
    first = (box[:2].floor() - 1).clamp(min=0).int().tolist()
    last = (box[2:].ceil() + 1).int().tolist()
    places = []  # of x and of y in the mask, from -1 to 1
    for i, side in enumerate((size[1], size[0])):
        pixels = torch.arange(first[i], min(last[i], side), dtype=torch.float32) + 0.5
        places.append((pixels - box[i]) / (box[i + 2] - box[i]) * 2 - 1)
    y, x = torch.meshgrid(places[1], places[0], indexing="ij")
    pasted = F.grid_sample(mask[None, None], torch.stack((x, y), -1)[None], align_corners=False)
    return encode_crop((pasted[0, 0] >= threshold).numpy(), first[1], first[0], size)


def crop_of_rle(rle: Rle) -> Crop:
    """RLE -> the smallest rectangle with all of its pixels; of no pixel: an empty bitmap."""
    return crops_of_rles([rle])[0]


def crops_of_rles(rles: Sequence[Rle]) -> list[Crop]:
    """:func:`crop_of_rle` of many masks, without a bitmap of their frames."""
    if not rles:
        return []
    starts, ends, owners = _runs_of_rles(rles)
    heights = np.array([rle["size"][0] for rle in rles], np.int64)[owners]
    columns, first_rows = np.divmod(starts, heights)
    last_columns, last_rows = np.divmod(ends - 1, heights)
    # A run that goes on in the next column has the frame's last row and its first.
    goes_on = columns != last_columns
    first_rows = np.where(goes_on, 0, first_rows)
    last_rows = np.where(goes_on, heights - 1, last_rows)
    found, at = np.unique(owners, return_index=True)  # masks with pixels
    crops = [Crop(0, 0, np.zeros((0, 0), bool))] * len(rles)
    if not len(found):
        return crops
    lefts, rights = columns[at], np.maximum.reduceat(last_columns, at) + 1
    tops, bottoms = np.minimum.reduceat(first_rows, at), np.maximum.reduceat(last_rows, at) + 1
    shapes = np.stack([rights - lefts, bottoms - tops], axis=1)
    bounds = np.append(at, len(starts))
    for group in _groups(shapes.prod(axis=1).tolist()):
        runs = slice(bounds[group.start], bounds[group.stop])
        which = np.repeat(np.arange(len(at[group])), np.diff(bounds)[group])
        offsets = np.cumsum([0, *shapes[group].prod(axis=1)])
        in_column = starts[runs] % heights[runs] - tops[group][which]
        begin = (columns[runs] - lefts[group][which]) * shapes[group][which, 1] + in_column
        begin += offsets[which]
        marks = np.zeros(offsets[-1] + 1, np.int8)
        np.add.at(marks, begin, 1)
        np.add.at(marks, begin + ends[runs] - starts[runs], -1)
        flat = np.cumsum(marks[:-1], dtype=np.int8).astype(bool)
        for i, shape in enumerate(shapes[group].tolist()):
            bitmap = flat[offsets[i] : offsets[i + 1]].reshape(shape).T
            k = group.start + i
            crops[found[k]] = crop_of_bitmap(bitmap, int(tops[k]), int(lefts[k]))
    return crops


def _runs_of_rles(rles: Sequence[Rle]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First pixel of each run of ones, the one after its last, and the number of its mask."""
    counts, owners = _counts(rles)
    sums = np.concatenate([[0], np.cumsum(counts)])
    first = np.searchsorted(owners, np.arange(len(rles)))  # of each mask's counts
    place = np.arange(len(counts)) - first[owners]
    is_ones = place % 2 == 1  # of counts, those of zeros come first
    base = sums[first][owners[is_ones]]
    index = np.flatnonzero(is_ones)
    starts, ends, owners = sums[index] - base, sums[index + 1] - base, owners[is_ones]
    has_pixels = ends > starts
    return starts[has_pixels], ends[has_pixels], owners[has_pixels]


def _counts(rles: Sequence[Rle]) -> tuple[np.ndarray, np.ndarray]:
    """Run lengths of COCO's compressed RLEs, and the number of the mask of each: rleFrString.

    Each length is a sequence of 5-bit groups, low ones first; from a mask's fourth on, it is the
    difference to the last but one.
    """
    texts = [c.encode() if isinstance(c := rle["counts"], str) else c for rle in rles]
    codes = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    if not len(codes):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    is_last = (codes & 0x20) == 0
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 0x1F) << shifts, starts)
    values -= np.where(codes[ends] & 0x10, 1 << (5 * lengths), 0)  # negative
    owners = np.searchsorted(np.cumsum([len(text) for text in texts]), starts, side="right")
    first = np.searchsorted(owners, np.arange(len(rles)))  # of each mask's values
    place = np.arange(len(values)) - first[owners]
    # x[i] = v[i] + x[i - 2] for i > 2, and x[0], x[1], x[2] as they are
    for is_chain in (place % 2 == 1, (place % 2 == 0) & (place > 0)):
        sums = np.cumsum(np.where(is_chain, values, 0))
        before = np.concatenate([[0], sums])[first][owners]
        values = np.where(is_chain, sums - before, values)
    return values, owners


def crop_of_bitmap(mask: np.ndarray, top: int = 0, left: int = 0) -> Crop:
    """``bool[H, W]``, which begins at (top, left) of its frame -> the part with pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Crop(top, left, np.zeros((0, 0), bool))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Crop(top + int(rows[0]), left + int(columns[0]), np.array(part, bool))


def polygons_of(crop: Crop) -> list[list[np.ndarray]]:
    """The outlines of a mask along the edges of its pixels, so that areas are exact.

    Returns:
        for each part that is connected by edges of pixels, the largest first: its outline and then
        its holes, ``float64[N, 2]`` of (x, y) in the frame, closed by repeating the first point.
        Outlines have a positive area by the shoelace formula with y down, holes a negative one.
    """
    num_labels, labels, statistics, _ = cv2.connectedComponentsWithStats(
        crop.bitmap.astype(np.uint8), connectivity=4
    )
    parts = sorted(range(1, num_labels), key=lambda i: -statistics[i, cv2.CC_STAT_AREA])
    polygons = []
    for index in parts:
        left, top, width, height, _ = statistics[index]
        part = labels[top : top + height, left : left + width] == index
        rings = [ring + (crop.left + left, crop.top + top) for ring in _rings(part)]
        rings.sort(key=lambda ring: -ring_area(ring))
        polygons.append(rings)
    return polygons


def ring_area(ring: np.ndarray) -> float:
    """Shoelace formula, for a closed ring ``[N, 2]``; positive if clockwise on the screen."""
    x, y = ring[:, 0] - ring[0, 0], ring[:, 1] - ring[0, 1]
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def _rings(part: np.ndarray) -> list[np.ndarray]:
    """Closed rings along the edges of a connected bitmap; no ring passes through a point twice."""
    framed = np.pad(part, 1).astype(np.int8)
    down, right = np.diff(framed, axis=0), np.diff(framed, axis=1)
    # Each edge has the inside on its right: (y, x) of the corner where it starts -> where it leads.
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for steps, offset_start, move in (
        (down == 1, (0, -1), (0, 1)),  # top edge, to the right
        (down == -1, (0, 0), (0, -1)),  # bottom edge, to the left
        (right == 1, (0, 0), (-1, 0)),  # left edge, up
        (right == -1, (-1, 0), (1, 0)),  # right edge, down
    ):
        for y, x in zip(*(v.tolist() for v in np.nonzero(steps)), strict=True):
            edges.setdefault((y + offset_start[0], x + offset_start[1]), []).append(move)
    rings = []
    while edges:
        start = next(iter(edges))
        rings += _walk(edges, start)
    return rings


def _walk(
    edges: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]
) -> list[np.ndarray]:
    """Take one closed walk out of ``edges``; where it meets itself, a ring is cut off."""
    path: list[tuple[int, int]] = [start]
    position = {start: 0}
    rings = []
    while True:
        y, x = path[-1]
        moves = edges[y, x]
        # Any choice at a corner where two pixels touch gives valid rings, because they are cut.
        dy, dx = moves.pop()
        if not moves:
            del edges[y, x]
        point = y + dy, x + dx
        if point not in position:
            position[point] = len(path)
            path.append(point)
            continue
        first = position[point]
        rings.append(_without_collinear(path[first:]))
        for gone in path[first + 1 :]:
            del position[gone]
        del path[first + 1 :]
        if first == 0 and start not in edges:
            return rings


def _without_collinear(path: list[tuple[int, int]]) -> np.ndarray:
    points = np.array(path, np.float64)[:, ::-1]
    steps = np.roll(points, -1, axis=0) - points
    turns = (steps != np.roll(steps, 1, axis=0)).any(axis=1)
    points = points[turns]
    return np.concatenate([points, points[:1]])


def paint_crops(crops: Iterable[Crop], size: tuple[int, int]) -> np.ndarray:
    """``bool[N, H, W]`` of crops in a frame."""
    crops = list(crops)
    masks = np.zeros((len(crops), *size), bool)
    for mask, crop in zip(masks, crops, strict=True):
        mask[crop.top : crop.bottom, crop.left : crop.right] = crop.bitmap
    return masks


def _coco_mask() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "masks as RLE need pycocotools: pip install 'spatial-mamba-d2[prediction]'"
        ) from error
    return mask
