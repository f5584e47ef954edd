"""Crops, runs, RLE and polygons of masks, against pycocotools and shapely."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from spatial_mamba_d2.prediction import masks
from spatial_mamba_d2.prediction.masks import (
    crop_of_bitmap,
    crop_of_rle,
    crops_of_rles,
    encode_bitmap,
    encode_runs,
    join_runs,
    num_pixels,
    polygons_of,
    ring_area,
    runs_of_crops,
)


def bitmaps():
    rng = np.random.default_rng(0)
    yield np.ones((1, 1), bool)
    yield np.ones((7, 5), bool)
    yield np.eye(9, dtype=bool)
    for density in (0.02, 0.3, 0.6, 0.95):
        for shape in ((1, 40), (40, 1), (13, 17), (64, 90)):
            mask = rng.random(shape) < density
            mask[rng.integers(shape[0]), rng.integers(shape[1])] = True
            yield mask
    full_columns = np.zeros((6, 9), bool)
    full_columns[:, 3:6] = True
    yield full_columns


@pytest.mark.parametrize("mask", list(bitmaps()), ids=lambda m: f"{m.shape}-{m.sum()}")
def test_all_forms_hold_the_same_pixels(mask):
    expected = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    crop = crop_of_bitmap(mask)
    (runs,) = runs_of_crops([crop], mask.shape[0])
    assert num_pixels(runs) == mask.sum()
    assert encode_bitmap(mask) == encode_runs(runs, mask.shape) == expected
    again = crop_of_rle(expected)
    assert (again.top, again.left) == (crop.top, crop.left)
    assert np.array_equal(again.bitmap, crop.bitmap)


@pytest.mark.parametrize("group_px", [1, 500, 2**22])
def test_many_masks_at_once(group_px, monkeypatch):
    """Of different frames, with and without pixels, and in groups of any size."""
    monkeypatch.setattr(masks, "_GROUP_PX", group_px)
    bitmaps_ = [*bitmaps(), np.zeros((3, 4), bool), *bitmaps(), np.zeros((0, 0), bool)]
    crops = crops_of_rles([encode_bitmap(bitmap) for bitmap in bitmaps_])
    for crop, bitmap in zip(crops, bitmaps_, strict=True):
        expected = crop_of_bitmap(bitmap)
        assert np.array_equal(crop.bitmap, expected.bitmap)
        assert not crop.bitmap.size or crop[:2] == expected[:2]
    for height in (64, 100):
        runs = runs_of_crops(crops, height)
        for one, crop in zip(runs, crops, strict=True):
            assert np.array_equal(one, runs_of_crops([crop], height)[0])
            assert num_pixels(one) == crop.bitmap.sum()
    assert crops_of_rles([]) == runs_of_crops([], 5) == []


def test_long_runs_of_large_frames_keep_their_lengths():
    size = (60_000, 60_000)
    runs = np.array([[5, 9], [3_000_000_000, 3_000_000_123], [3_599_999_990, 3_600_000_000]])
    rle = encode_runs(runs, size)
    assert coco_mask.area(rle) == num_pixels(runs) == 137
    assert np.array_equal(np.stack(masks._runs_of_rles([rle])[:2], axis=1), runs)
    with pytest.raises(ValueError, match=r"fewer than 2\^32 pixels.*got 70000 x 70000"):
        encode_runs(runs, (70_000, 70_000))


def test_an_empty_mask():
    rle = encode_bitmap(np.zeros((4, 5), bool))
    assert crop_of_rle(rle).bitmap.size == 0
    assert encode_runs(np.zeros((0, 2), np.int64), (4, 5)) == rle


def test_runs_of_a_union():
    first, second = np.array([[0, 4], [10, 12]]), np.array([[3, 6], [12, 15], [20, 21]])
    assert join_runs([first, second]).tolist() == [[0, 6], [10, 15], [20, 21]]


@pytest.mark.parametrize("mask", list(bitmaps()), ids=lambda m: f"{m.shape}-{m.sum()}")
def test_polygons_are_valid_and_have_the_area_of_the_pixels(mask):
    geometry = pytest.importorskip("shapely.geometry")
    parts = []
    for outline, *holes in polygons_of(crop_of_bitmap(mask, 100, 200)):
        assert ring_area(outline) > 0 > max(map(ring_area, holes), default=-1)
        part = geometry.Polygon(outline, holes)
        assert part.is_valid
        parts.append(part)
    assert sum(part.area for part in parts) == mask.sum()
    union = geometry.MultiPolygon(parts)
    rows, columns = np.nonzero(mask)
    for y, x in list(zip(rows, columns, strict=True))[::7]:
        assert union.covers(geometry.Point(200 + x + 0.5, 100 + y + 0.5))
