"""Detections of windows become detections of the image: each object once, and complete.

The rules, for two detections of one class in two windows that overlap:

1. Only what both windows see is compared: the parts of the two masks (or boxes, if there are no
   masks) in the margin that the windows share.
2. They are one object if the IoU of these parts is at least :data:`MATCH_IOU`. In a pair of windows
   each detection is matched once, the best pairs first.
3. A detection that an inner edge of its window cuts, and that rule 2 has not matched, is one object
   with the detection that covers at least :data:`COVERED_SHARE` of its part in the margin, or, of
   two pieces of one object, with the one that it covers.

Matches are joined by union-find, so an object may cross any number of windows. Of the detections
that are one object:

4. Those with less than :data:`WEAK_SHARE` of the highest score are left out. If one that no inner
   edge cuts has at least :data:`COMPLETE_SHARE` of the pixels of all of them together, that one is
   the result: the one with the highest score, with the mean box of all such ones, by their scores.
5. Else the result is the union of masks, and the box around it; or the union of boxes.
6. Windows that hold the box of the result complete are its witnesses. Its score is the mean of the
   scores that these give it, 0 for a witness that does not: so what only a window at whose edge it
   is has taken for an object does not stay, nor do false detections add up where windows overlap.
   Without a witness, because the object is larger than the overlap, it is the highest score.

Parts of an object that are nowhere connected within a margin stay apart: nothing tells that they
belong together. Results come as soon as no later window can reach them, in an order that depends
on the windows only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from spatial_mamba_d2.prediction.masks import (
    Crop,
    crops_of_rles,
    encode_runs,
    join_runs,
    num_pixels,
    runs_of_crops,
)
from spatial_mamba_d2.prediction.results import Detections
from spatial_mamba_d2.prediction.windows import Grid, Window

MATCH_IOU = 0.5
COVERED_SHARE = 0.8
# Tuned on the detector of dev.py demo, on a mosaic of its validation images (docs/large_images.md).
COMPLETE_SHARE = 0.5
WEAK_SHARE = 0.5
_LEAST_WEIGHT = 1e-9  # scores may be 0
CUT_PX = 2  # a detection is cut if it ends so close to an inner edge of its window


@dataclass(eq=False)
class _Fragment:
    """A detection of one window, in the frame of the image.

    ``owner`` leads to the fragment that stands for its object, which has the ``members``.
    """

    number: int  # in the order of windows and of detections in them
    window: int
    class_index: int
    score: float
    box: np.ndarray  # float32[4]
    crop: Crop
    is_cut: bool
    owner: _Fragment | None = None
    members: list[_Fragment] | None = None

    def __post_init__(self) -> None:
        self.members = [self]

    def find(self) -> _Fragment:
        root = self
        while root.owner is not None:
            root = root.owner
        node = self
        while node.owner is not None:  # later searches are short
            node.owner, node = root, node.owner
        return root

    def join(self, other: _Fragment) -> None:
        first, second = sorted((self.find(), other.find()), key=lambda f: f.number)
        if first is not second:
            assert first.members is not None and second.members is not None
            first.members += second.members
            second.owner, second.members = first, None


def merge_detections(
    grid: Grid,
    results: Iterable[Detections | None],
    names: tuple[str, ...],
    score_thresh: float = 0.0,
) -> Iterator[Detections]:
    """Objects of the image from those of its windows.

    Args:
        results: of each window of ``grid``, in this order; None for windows without a result.
        names: of the classes.
        score_thresh: the lowest score of objects; of detections in windows, all scores count.

    Yields:
        objects in the frame of the image, those of about one row of windows at a time. Memory holds
        those of about two rows, and of objects that reach into them.
    """
    merger = _Merger(grid, names)
    num_columns = len(grid.lefts)
    for index, result in enumerate(results):
        if result is not None:
            merger.add(index, result)
        if index % num_columns == num_columns - 1:
            found = merger.finish_row(index // num_columns)
            if objects := [f for f in found if f.score > 0 and f.score >= score_thresh]:
                yield merger.build(objects)


class _Merger:
    def __init__(self, grid: Grid, names: tuple[str, ...]):
        self.grid, self.names = grid, names
        self.with_masks = False
        self.num_fragments = 0
        self.predicted: set[int] = set()  # windows with a result, as far as they count
        self.open: dict[int, list[_Fragment]] = {}  # window -> fragments that later ones may meet
        self.objects: list[_Fragment] = []  # open ones, by the fragment that stands for them

    def add(self, index: int, result: Detections) -> None:
        window = self.grid[index]
        self.with_masks = result.masks is not None
        fragments = list(self._fragments(index, result))
        self.predicted.add(index)
        for other_index, others in self.open.items():
            if shared := window.shared_with(self.grid[other_index]):
                _match(fragments, others, shared)
        self.open[index] = fragments
        self.objects += fragments

    def _fragments(self, index: int, result: Detections) -> Iterator[_Fragment]:
        window = self.grid[index]
        offset = np.array([window.left, window.top] * 2, np.float32)
        crops = _crops(result)
        are_cut = self._are_cut(window, result.boxes, crops)
        for i, (box, crop, is_cut) in enumerate(zip(result.boxes, crops, are_cut, strict=True)):
            if not crop.bitmap.size:
                continue  # a mask without a pixel
            crop = crop._replace(top=crop.top + window.top, left=crop.left + window.left)
            self.num_fragments += 1
            yield _Fragment(
                self.num_fragments,
                index,
                int(result.classes[i]),
                float(result.scores[i]),
                box + offset,
                crop,
                is_cut,
            )

    def _are_cut(self, window: Window, boxes: np.ndarray, crops: Sequence[Crop]) -> list[bool]:
        """Whether mask or box ends at an inner edge of the window."""
        masks = np.array([(c.left, c.top, c.right, c.bottom) for c in crops]).reshape(-1, 4)
        low = np.minimum(masks, boxes)[:, 1::-1]  # y, x
        high = window.size - np.maximum(masks, boxes)[:, :1:-1]
        gaps = np.concatenate([low, high], axis=1)  # of top, left, bottom and right
        inner = np.array(self.grid.inner_edges(window))
        return ((gaps < CUT_PX) & inner).any(axis=1).tolist()

    def finish_row(self, row: int) -> list[_Fragment]:
        """The objects that no window after this row can reach."""
        tops = self.grid.tops
        limit = tops[row + 1] if row + 1 < len(tops) else self.grid.size[0]
        done: list[_Fragment] = []
        waiting: list[_Fragment] = []
        for fragment in self.objects:
            if fragment.owner is not None:
                continue  # stands for nothing any more
            assert fragment.members is not None
            reach = max(member.crop.bottom for member in fragment.members)
            (done if reach <= limit else waiting).append(fragment)
        self.objects = waiting
        self.open = {
            index: [f for f in fragments if f.crop.bottom > limit]
            for index, fragments in self.open.items()
            if self.grid[index].bottom > limit
        }
        merged = [self._merge(fragment) for fragment in done]
        self.predicted = {i for i in self.predicted if self.grid[i].bottom > limit}
        return merged

    def _merge(self, fragment: _Fragment) -> _Fragment:
        members = fragment.members
        assert members is not None
        merged = self._shape(fragment, members)
        merged.score = self._score(merged.box, members)
        return merged

    def _score(self, box: np.ndarray, members: Sequence[_Fragment]) -> float:
        """By rule 6."""
        scores: dict[int, float] = {}
        for member in members:
            scores[member.window] = max(scores.get(member.window, 0.0), member.score)
        windows = self.grid.windows_with(box.tolist(), CUT_PX)
        witnesses = [window for window in windows if window in self.predicted]
        if not witnesses:
            return max(scores.values())
        return sum(scores.get(window, 0.0) for window in witnesses) / len(witnesses)

    def _shape(self, fragment: _Fragment, members: list[_Fragment]) -> _Fragment:
        """Box and mask of an object, by rules 4 and 5."""
        if len(members) == 1:
            return fragment
        least = WEAK_SHARE * max(member.score for member in members)
        members = [member for member in members if member.score >= least]
        height = self.grid.size[0]
        union = num_pixels(join_runs(runs_of_crops([m.crop for m in members], height)))
        complete = [
            m for m in members if not m.is_cut and m.crop.bitmap.sum() >= COMPLETE_SHARE * union
        ]
        if complete:
            best = max(complete, key=lambda m: (m.score, m.crop.bitmap.sum(), -m.number))
            weights = np.array([m.score for m in complete], np.float64) + _LEAST_WEIGHT
            box = np.average([m.box for m in complete], axis=0, weights=weights)
            return replace(best, box=box.astype(np.float32), owner=None)
        boxes = np.stack([self._tight_box(m) for m in members])
        box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
        merged = replace(fragment, box=box)
        merged.members = members
        return merged

    def _tight_box(self, fragment: _Fragment) -> np.ndarray:
        """Around the mask, if there is one: boxes of detections that are cut are less exact."""
        if not self.with_masks:
            return fragment.box
        crop = fragment.crop
        return np.array([crop.left, crop.top, crop.right, crop.bottom], np.float32)

    def build(self, objects: list[_Fragment]) -> Detections:
        masks = None
        if self.with_masks:
            crops = [member.crop for f in objects for member in f.members or ()]
            runs = iter(runs_of_crops(crops, self.grid.size[0]))
            parts = [list(islice(runs, len(f.members or ()))) for f in objects]
            masks = tuple(encode_runs(join_runs(part), self.grid.size) for part in parts)
        return Detections(
            boxes=np.stack([f.box for f in objects]).astype(np.float32),
            scores=np.array([f.score for f in objects], np.float32),
            classes=np.array([f.class_index for f in objects], np.int64),
            masks=masks,
            names=self.names,
            image_size=self.grid.size,
        )


def _crops(result: Detections) -> list[Crop]:
    """The masks of detections, or their boxes, in the frame of the window."""
    if result.masks is not None:
        return crops_of_rles(result.masks)
    height, width = result.image_size
    low = np.maximum(np.floor(result.boxes[:, :2]), 0).astype(np.int64)
    high = np.minimum(np.ceil(result.boxes[:, 2:]), (width, height)).astype(np.int64)
    return [
        Crop(top, left, np.ones((max(bottom - top, 0), max(right - left, 0)), bool))
        for (left, top), (right, bottom) in zip(low.tolist(), high.tolist(), strict=True)
    ]


def _match(fragments: list[_Fragment], others: list[_Fragment], shared: Window) -> None:
    """Join the fragments of two windows that are one object, by rules 1 to 3."""
    firsts, seconds = _in(fragments, shared), _in(others, shared)
    if not firsts or not seconds:
        return
    pairs = []
    rectangles = [np.array([_rectangle(f) for f in side]) for side in (firsts, seconds)]
    classes = [np.array([f.class_index for f in side]) for side in (firsts, seconds)]
    first, second = (r[:, None] if i == 0 else r[None] for i, r in enumerate(rectangles))
    meets = (first[..., :2] < second[..., 2:]).all(-1) & (second[..., :2] < first[..., 2:]).all(-1)
    meets &= classes[0][:, None] == classes[1][None]
    for i, j in np.argwhere(meets).tolist():
        a, b = firsts[i], seconds[j]
        common = _rectangle_of_both(a, b, shared)
        inside = int((a.crop.within(*common) & b.crop.within(*common)).sum())
        if inside:
            areas = [int(f.crop.within(*shared).sum()) for f in (a, b)]
            pairs.append((inside / (sum(areas) - inside), inside, areas, i, j))
    pairs.sort(key=lambda pair: (-pair[0], pair[3], pair[4]))
    matched: set[tuple[int, int]] = set()  # (side, index)
    for iou, _, _, i, j in pairs:
        if iou >= MATCH_IOU and not matched & {(0, i), (1, j)}:
            matched |= {(0, i), (1, j)}
            firsts[i].join(seconds[j])
    for _, inside, areas, i, j in pairs:
        for side, k, area in ((0, i, areas[0]), (1, j, areas[1])):
            fragment = (firsts, seconds)[side][k]
            if fragment.is_cut and (side, k) not in matched and inside >= COVERED_SHARE * area:
                matched.add((side, k))
                firsts[i].join(seconds[j])


def _in(fragments: list[_Fragment], window: Window) -> list[_Fragment]:
    meets = (
        f
        for f in fragments
        if f.crop.top < window.bottom
        and f.crop.left < window.right
        and window.top < f.crop.bottom
        and window.left < f.crop.right
    )
    return [f for f in meets if f.crop.within(*window).any()]


def _rectangle(fragment: _Fragment) -> tuple[int, int, int, int]:
    crop = fragment.crop
    return crop.top, crop.left, crop.bottom, crop.right


def _rectangle_of_both(a: _Fragment, b: _Fragment, shared: Window) -> tuple[int, int, int, int]:
    tops, lefts, bottoms, rights = zip(_rectangle(a), _rectangle(b), shared, strict=True)
    return max(tops), max(lefts), min(bottoms), min(rights)
