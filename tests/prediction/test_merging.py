"""Objects of windows against the truth of the scene: none twice, none lost, each complete."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.masks import crop_of_rle, encode_bitmap
from spatial_mamba_d2.prediction.merging import merge_detections
from spatial_mamba_d2.prediction.results import Detections, join_detections
from spatial_mamba_d2.prediction.windows import Grid


def ious(found, scene) -> dict[int, list[float]]:
    """The IoU of each result with the object that it shows, by that object's number."""
    sizes = np.bincount(scene.numbers.ravel())
    shown: dict[int, list[float]] = {}
    for i, mask in enumerate(found.masks):
        crop = crop_of_rle(mask)
        part = scene.numbers[crop.top : crop.bottom, crop.left : crop.right]
        counts = np.bincount(part[crop.bitmap], minlength=len(sizes))
        number = int(counts[1:].argmax()) + 1
        assert number % 3 == found.classes[i]
        inside = counts[number]
        union = sizes[number] + crop.bitmap.sum() - inside
        shown.setdefault(number, []).append(inside / union)
    return shown


@pytest.mark.parametrize(("window", "overlap"), [(256, 64), (256, 16), (301, 150), (128, 2)])
def test_an_oracle_finds_each_object_once(scene, oracle, window, overlap):
    found = Predictor(oracle())(scene.image, window_px=window, overlap_px=overlap, score_thresh=0)
    shown = ious(found, scene)
    assert len(shown) == scene.num_objects  # none is lost
    assert all(len(values) == 1 for values in shown.values())  # none comes twice
    assert min(values[0] for values in shown.values()) == 1
    direct = Predictor(oracle())(scene.image, score_thresh=0)
    assert sorted(found.boxes.tolist()) == sorted(direct.boxes.tolist())
    assert sorted(found.scores.tolist()) == sorted(direct.scores.tolist())


def test_masks_that_are_uncertain_at_their_edges(scene, oracle):
    """Each window sees each mask larger or smaller by a pixel, and misses slivers."""
    model, rng = oracle(), np.random.default_rng(1)

    def change(mask):
        kernel = np.ones((3, 3), np.uint8)
        operation = (cv2.dilate, cv2.erode, lambda m, k: m)[rng.integers(3)]
        changed = operation(mask.astype(np.uint8), kernel) > 0
        return changed if mask.sum() > 30 else np.zeros_like(mask)

    model.change = change
    found = Predictor(model)(scene.image, window_px=256, overlap_px=64, score_thresh=0)
    shown = ious(found, scene)
    sizes = np.bincount(scene.numbers.ravel())
    # A pixel changes most of small objects and of rings.
    solid = [n for n in range(1, len(sizes)) if sizes[n] > 400 and (n % 3 or n <= 6)]
    assert len(solid) > 40 and set(solid) <= set(shown)
    assert all(len(shown[number]) == 1 for number in solid)
    spanning = range(1, 7)
    assert min(shown[number][0] for number in spanning) >= 0.8


def box_of(*corners, score=0.9, class_index=0):
    return Detections(
        boxes=np.array([corners], np.float32), scores=np.array([score], np.float32),
        classes=np.array([class_index]), names=("a", "b"), image_size=(100, 100),
    )  # fmt: skip


def merged(grid, *windows):
    return join_detections(merge_detections(grid, windows, ("a", "b")), ("a", "b"), grid.size)


def test_boxes_without_masks():
    grid = Grid((100, 180), 100, 20)  # the margin is columns 80 to 100
    whole = merged(grid, box_of(85, 10, 95, 20), box_of(5, 10, 15, 20, score=0.7))
    assert whole.boxes.tolist() == [[85, 10, 95, 20]] and whole.masks is None
    assert whole.scores == pytest.approx([0.8])  # the mean of the two that see all of it
    crossing = merged(grid, box_of(40, 10, 100, 20, score=0.6), box_of(0, 10, 50, 20, score=0.8))
    assert crossing.boxes.tolist() == [[40, 10, 130, 20]]
    assert crossing.scores == pytest.approx([0.8])
    # A window that sees all of it decides, whatever a cut detection says of it.
    cut = merged(grid, box_of(82, 10, 100, 20, score=0.95), box_of(2, 10, 21, 20, score=0.6))
    assert cut.boxes.tolist() == [[82, 10, 101, 20]]
    assert cut.scores == pytest.approx([0.6])


def test_a_window_that_sees_a_place_completely_counts():
    """The margin is columns 80 to 100: objects in it are complete in both windows."""
    grid = Grid((100, 180), 100, 20)
    cut = merged(grid, box_of(90, 10, 100, 20), box_of(40, 40, 60, 60))
    assert cut.boxes.tolist() == [[120, 40, 140, 60]]  # the other window sees nothing there
    doubted = merged(grid, box_of(85, 10, 95, 20), box_of(40, 40, 60, 60))
    assert dict(zip(doubted.boxes[:, 0].tolist(), doubted.scores.tolist(), strict=True)) == {
        85: pytest.approx(0.45), 120: pytest.approx(0.9)
    }  # fmt: skip
    assert len(merged(grid, box_of(90, 10, 100, 20), None)) == 1  # no result says nothing
    too_low = merge_detections(
        grid, [box_of(85, 10, 95, 20), box_of(40, 40, 60, 60)], ("a", "b"), 0.5
    )
    assert [found.boxes.tolist() for found in too_low] == [[[120, 40, 140, 60]]]


def test_what_is_not_the_same_object():
    grid = Grid((100, 180), 100, 20)
    assert len(merged(grid, box_of(85, 10, 95, 20), box_of(5, 30, 15, 40))) == 2
    other_class = box_of(5, 10, 15, 20, class_index=1)
    assert len(merged(grid, box_of(85, 10, 95, 20), other_class)) == 2
    assert len(merged(grid, box_of(85, 10, 95, 20), None)) == 1
    assert len(merged(grid, None, None)) == 0


def test_a_small_object_in_front_of_a_large_one_stays():
    """Their masks overlap, both are cut, and both are seen by both windows."""
    grid = Grid((100, 180), 100, 20)
    first = [box_of(20, 20, 100, 80), box_of(90, 40, 100, 50, score=0.8)]
    second = [box_of(0, 20, 60, 80), box_of(10, 40, 30, 50, score=0.7)]
    windows = [join_detections(parts, ("a", "b"), (100, 100)) for parts in (first, second)]
    found = merged(grid, *windows)
    assert sorted(found.boxes.tolist()) == [[20, 20, 140, 80], [90, 40, 110, 50]]


def test_two_pieces_of_one_object_are_joined_by_the_window_that_sees_their_connection():
    canvas = np.zeros((100, 180), bool)
    canvas[20:30, 20:150] = canvas[60:70, 20:150] = canvas[20:70, 20:30] = True  # a C
    grid = Grid(canvas.shape, 100, 20)

    def detect(masks):
        return Detections(
            boxes=np.array([box(m) for m in masks], np.float32).reshape(-1, 4),
            scores=np.full(len(masks), 0.9, np.float32), classes=np.zeros(len(masks), np.int64),
            masks=tuple(map(encode_bitmap, masks)), names=("a", "b"), image_size=(100, 100),
        )  # fmt: skip

    def box(mask):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1

    right = canvas[grid[1].slices]
    upper, lower = right.copy(), right.copy()
    upper[50:], lower[:50] = False, False
    found = merged(grid, detect([canvas[grid[0].slices]]), detect([upper, lower]))
    assert len(found) == 1
    assert np.array_equal(found.bitmaps()[0], canvas)


def test_memory_does_not_grow_with_the_image(oracle, scene_of):
    """Objects come a row of windows at a time."""
    tall = scene_of((2000, 300), 80, 1)
    grid = Grid(tall.numbers.shape, 256, 64)
    model = oracle()
    results = (model(tall.image[window.slices]) for window in grid)
    chunks = list(merge_detections(grid, results, model.names))
    assert len(chunks) > 4 and max(map(len, chunks)) < tall.num_objects / 2
    assert sum(map(len, chunks)) == tall.num_objects


def test_masks_without_pixels_are_no_objects():
    grid = Grid((100, 180), 100, 20)
    empty = replace(box_of(1, 2, 3, 4), masks=(encode_bitmap(np.zeros((100, 100), bool)),))
    assert len(merged(grid, empty, None)) == 0
