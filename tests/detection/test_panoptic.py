"""Panoptic segmentation: label maps, ground truth, panoptic quality."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from detectron2.data import Metadata

from spatial_mamba_d2.data.panoptic import write_stuff_labels
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.panoptic import (
    FALSE,
    IOU,
    MATCHED,
    MISSED,
    Segments,
    build_ground_truth,
    count_segments,
    panoptic_quality,
    read_semantic,
)


def row(*ids):
    return np.array([ids])


def test_matches_have_the_same_category_and_more_than_half():
    truth = Segments(row(1, 1, 1, 2, 2, 2, 2, 3), {1: 0, 2: 1, 3: 1})
    found = Segments(row(5, 5, 6, 6, 6, 6, 6, 7), {5: 0, 6: 1, 7: 0})
    sums = count_segments(truth, found, 2)
    assert sums[0] == pytest.approx([2 / 3, 1, 1, 0])  # 5 matches 1; 7 is of another category
    assert sums[1] == pytest.approx([4 / 5, 1, 0, 1])
    scores = panoptic_quality(sums, 1)
    assert scores["PQ_th"] == pytest.approx(100 * (2 / 3) / 1.5)
    assert scores["SQ_st"] == pytest.approx(80)
    assert scores["RQ_st"] == pytest.approx(100 / 1.5)
    assert scores["PQ"] == pytest.approx((scores["PQ_th"] + scores["PQ_st"]) / 2)


def test_pixels_without_a_segment_and_crowds_are_not_counted():
    """1 is matched as if the 0s were not there; 6 is in the crowd 2, 7 outside, 8 is wrong."""
    truth = Segments(row(1, 1, 0, 0, 2, 2, 2, 0, 0, 1), {1: 0, 2: 0}, frozenset({2}))
    found = Segments(row(5, 5, 5, 5, 6, 6, 0, 7, 7, 8), {5: 0, 6: 0, 7: 0, 8: 0})
    sums = count_segments(truth, found, 1)[0]
    assert sums[[MATCHED, FALSE, MISSED]].tolist() == [1, 1, 0]
    assert sums[IOU] == pytest.approx(2 / 3)
    other = Segments(truth.ids, {1: 0, 2: 1}, frozenset({2}))  # a crowd of another category
    assert count_segments(other, found, 2)[0, FALSE] == 2


def test_nothing_found_and_nothing_there():
    empty = Segments(row(0, 0), {})
    assert not count_segments(empty, empty, 3).any()
    scores = panoptic_quality(np.zeros((3, 4)), 2)
    assert all(np.isnan(value) for value in scores.values())


def test_the_definition_on_random_maps():
    """Against a loop over all pairs of segments, by the formulas of the paper."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        blocks = [rng.integers(0, 4, (4, 4)).repeat(3, 0).repeat(3, 1) for _ in range(2)]
        noise = rng.random((12, 12)) < 0.1
        blocks[1] = np.where(noise, blocks[1], blocks[0])
        truth = Segments(blocks[0], {i: int(rng.integers(2)) for i in (1, 2, 3)})
        found = Segments(blocks[1], {**truth.categories, 3: int(rng.integers(2))})
        expected = np.zeros((2, 4))
        for category in range(2):
            mine = [i for i, c in truth.categories.items() if c == category]
            theirs = [i for i, c in found.categories.items() if c == category]
            mine = [i for i in mine if (truth.ids == i).any()]
            theirs = [i for i in theirs if (found.ids == i).any()]
            hits = {}
            for i in mine:
                for k in theirs:
                    a, b = truth.ids == i, (found.ids == k) & (truth.ids != 0)
                    if (iou := (a & b).sum() / (a | b).sum()) > 0.5:
                        hits[i, k] = iou
            wrong = [
                k for k in theirs if k not in {k for _, k in hits}
                and (truth.ids[found.ids == k] == 0).mean() <= 0.5
            ]  # fmt: skip
            expected[category] = sum(hits.values()), len(hits), len(wrong), len(mine) - len(hits)
        np.testing.assert_allclose(count_segments(truth, found, 2), expected)


@pytest.fixture
def coco_panoptic(tmp_path):
    """A panoptic file in COCO's format: a thing 300 and a crowd 7 on stuff 5, of one image."""
    ids = np.full((4, 6), 5)
    ids[0, :3], ids[1], ids[3] = 300, 7, 0
    image = np.stack([ids % 256, ids // 256, ids * 0], axis=2).astype(np.uint8)
    (tmp_path / "panoptic").mkdir()
    cv2.imwrite(str(tmp_path / "panoptic/a.png"), image[..., ::-1])
    segments = [
        {"id": 300, "category_id": 2, "iscrowd": 0}, {"id": 7, "category_id": 2, "iscrowd": 1},
        {"id": 5, "category_id": 90, "iscrowd": 0},
    ]  # fmt: skip
    content = {
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [
            {"id": 2, "isthing": 1}, {"id": 90, "isthing": 0}, {"id": 80, "isthing": 0},
        ],
    }  # fmt: skip
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    return tmp_path


def test_label_maps_of_coco(coco_panoptic):
    folder = coco_panoptic
    arguments = (folder / "panoptic.json", folder / "panoptic", folder / "stuff")
    assert write_stuff_labels(*arguments) == 1
    label = read_semantic(str(folder / "stuff/a.png"), (4, 6), 3, 255)
    assert label.tolist() == [[0, 0, 0, 2, 2, 2], [0] * 6, [2] * 6, [255] * 6]
    with pytest.raises(ValueError, match=r"a.png: must have its image's size \(6, 4\), got"):
        read_semantic(str(folder / "stuff/a.png"), (6, 4), 3, 255)
    with pytest.raises(ValueError, match=r"below MODEL.SEM_SEG_HEAD.NUM_CLASSES 2, .*got \[2\]"):
        read_semantic(str(folder / "stuff/a.png"), (4, 6), 2, 255)
    (folder / "panoptic.json").write_text("{}")
    with pytest.raises(ValueError, match="panoptic.json: must be in COCO's panoptic format"):
        write_stuff_labels(*arguments)


def test_ground_truth_of_coco(coco_panoptic):
    metadata = Metadata(
        panoptic_json=str(coco_panoptic / "panoptic.json"),
        panoptic_root=str(coco_panoptic / "panoptic"),
        thing_dataset_id_to_contiguous_id={2: 0},
        stuff_dataset_id_to_contiguous_id={80: 1, 90: 2},
    )
    cfg = load_config(None, ["MODEL.ROI_HEADS.NUM_CLASSES", "1"])
    truth = build_ground_truth(cfg, metadata)({"image_id": 1})
    assert truth.categories == {300: 0, 7: 0, 5: 3} and truth.crowds == {7}
    assert truth.ids[0].tolist() == [300] * 3 + [5] * 3
    assert count_segments(truth, truth._replace(crowds=frozenset()), 4)[0, MATCHED] == 1


def test_ground_truth_of_instances_and_label_maps(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[1, 1, 0, 255]] * 4, np.uint8))
    large, small = [0, 0, 3, 0, 3, 4, 0, 4], [2, 1, 3, 1, 3, 3, 2, 3]
    annotations = [
        {"category_id": 1, "iscrowd": 0, "segmentation": [small]},
        {"category_id": 0, "iscrowd": 1, "segmentation": [large]},
    ]
    record = {"height": 4, "width": 4, "sem_seg_file_name": str(tmp_path / "a.png"),
              "annotations": annotations}  # fmt: skip
    model = SimpleNamespace(
        ROI_HEADS=SimpleNamespace(NUM_CLASSES=2),
        SEM_SEG_HEAD=SimpleNamespace(NUM_CLASSES=2, IGNORE_VALUE=255),
    )
    truth = build_ground_truth(SimpleNamespace(MODEL=model), Metadata())(record)
    assert [truth.categories.get(i) for i in truth.ids[1]] == [0, 0, 1, None]
    assert truth.crowds == {i for i, c in truth.categories.items() if c == 0}
