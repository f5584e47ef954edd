"""Result types, their other forms, and the sources that a predictor takes."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.results import Detections


@pytest.fixture
def predict(oracle):
    return Predictor(oracle())


def test_detections_in_coco_form(predict, scene):
    found = predict(scene.image, score_thresh=0)
    items = found.to_coco(image_id=7)
    assert len(items) == scene.num_objects
    for item, number in zip(items, np.unique(scene.numbers)[1:], strict=True):
        mask = scene.numbers == number
        assert np.array_equal(coco_mask.decode(item["segmentation"]), mask)
        x, y, width, height = item["bbox"]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (x, y) == (columns[0], rows[0])
        assert (width, height) == (columns[-1] - x + 1, rows[-1] - y + 1)
        assert item["area"] == mask.sum() and item["image_id"] == 7
        assert item["category_id"] == number % 3 + 1


def test_threshold_and_selection(predict, scene):
    found = predict(scene.image, score_thresh=0)
    kept = predict(scene.image, score_thresh=0.75)
    assert len(kept) == (found.scores >= 0.75).sum() and kept.scores.min() >= 0.75
    two = found.select(np.array([3, 1]))
    assert two.boxes.tolist() == found.boxes[[3, 1]].tolist()
    assert two.masks == (found.masks[3], found.masks[1])


def test_arrays_of_other_lengths_are_refused():
    good = {
        "boxes": np.zeros((2, 4), np.float32), "scores": np.zeros(2, np.float32),
        "classes": np.zeros(2, np.int64), "names": ("a",), "image_size": (4, 4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"boxes must be \[2, 4\], got \[3, 4\]"):
        Detections(**{**good, "boxes": np.zeros((3, 4))})
    with pytest.raises(ValueError, match="ids must be 2, one for each score, got 1"):
        Detections(**good, ids=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="classes must be indices of the 1 names, got 0 to 1"):
        Detections(**{**good, "classes": np.array([0, 1])})
    with pytest.raises(ValueError, match="masks must be given for bitmaps"):
        Detections(**good).bitmaps()


def test_supervision(predict, oracle, scene):
    pytest.importorskip("supervision", reason="supervision is not installed")
    found = predict(scene.image, score_thresh=0)
    other = found.to_supervision()
    assert np.array_equal(other.xyxy, found.boxes) and np.array_equal(other.mask, found.bitmaps())
    assert other.data["class_name"][0] == found.names[found.classes[0]]
    stuff = Predictor(oracle("segmentation"))(scene.image).to_supervision()
    assert np.array_equal(stuff.mask[1], scene.numbers % 3 == 1)
    classes = Predictor(oracle("classification"))(scene.image).to_supervision()
    assert len(classes.class_id) == 3


@pytest.mark.parametrize("task", ["detection", "segmentation", "classification"])
def test_pandas(oracle, scene, task):
    pytest.importorskip("pandas", reason="pandas is not installed")
    result = Predictor(oracle(task))(scene.image)
    table = result.to_pandas()
    assert list(table["name"]) == [row["name"] for row in result.rows()] and len(table)
    if task == "segmentation":
        assert table["pixels"].sum() == scene.numbers.size


def test_a_missing_package_is_named(predict, scene, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ImportError, match=r"needs supervision: pip install .*\[prediction\]"):
        predict(scene.image).to_supervision()


def test_label_maps_in_coco_form(oracle, scene):
    result = Predictor(oracle("segmentation"))(scene.image)
    for index, item in enumerate(result.to_coco()):
        assert np.array_equal(coco_mask.decode(item["segmentation"]), scene.numbers % 3 == index)


def test_one_image_or_many(oracle, scene, tmp_path):
    predict = Predictor(oracle("classification"))
    for name in ("b.png", "a.png", "sub/c.png"):
        write_image(tmp_path / name, scene.image[: 100 + ord(name[-5])])
    direct = predict(scene.image)
    assert direct.source is None
    one = predict(tmp_path / "a.png")
    assert one.source == tmp_path / "a.png" and one.top(1)[0][0] == "ball"
    (tmp_path / "list.txt").write_text("# the second, then the first\nsub/c.png\n\na.png\n")
    for source, names in (
        (tmp_path, "a b c"), (tmp_path / "*.png", "a b"), (str(tmp_path / "**/*.png"), "a b c"),
        (tmp_path / "list.txt", "c a"), ([tmp_path / "b.png", str(tmp_path / "a.png")], "b a"),
    ):  # fmt: skip
        results = predict(source)
        assert iter(results) is results  # lazy
        assert [result.source.stem for result in results] == names.split()
    arrays = list(predict(iter([scene.image, scene.image])))
    assert np.array_equal(arrays[1].scores, direct.scores)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"uint8\[H, W, C\], got uint8\[4, 5\]"),
        (np.zeros((4, 5, 3)), r"got float64\[4, 5, 3\]"),
        (np.zeros((4, 5, 4), np.uint8), "image must have 3 channels, got 4"),
    ],
)
def test_arrays_that_are_no_images(predict, image, message):
    with pytest.raises(ValueError, match=message):
        predict(image)


def test_arguments_out_of_range(predict, scene, tmp_path):
    with pytest.raises(ValueError, match=r"score_thresh must be in \[0, 1\], got 2"):
        predict(scene.image, score_thresh=2)
    with pytest.raises(ValueError, match="overlap_px needs window_px"):
        predict(scene.image, overlap_px=8)
    with pytest.raises(FileNotFoundError, match="absent"):
        predict(tmp_path / "absent.png")
    with pytest.raises(FileNotFoundError, match="matches the pattern"):
        predict(tmp_path / "*.jpg")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="must name at least one image"):
        predict(tmp_path / "empty.txt")


def test_batches_are_of_one_size(oracle, scene):
    """Neighbours of one size; results are in the order of the images."""
    model = oracle()
    sizes = [40, 40, 40, 50, 40, 40]
    images = [scene.image[:size, :size] for size in sizes]
    results = list(Predictor(model)(images, batch_size=2, score_thresh=0))
    assert model.batch_sizes == [2, 1, 1, 2]
    assert [result.image_size[0] for result in results] == sizes
    expected = [Predictor(oracle())(image, score_thresh=0) for image in images]
    for found, alone in zip(results, expected, strict=True):
        assert np.array_equal(found.boxes, alone.boxes)
    with pytest.raises(ValueError, match=r"batch_size \(--batch-size\) must be at least 1, got 0"):
        Predictor(model)(images, batch_size=0)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_batches_of_windows(oracle, scene, task):
    model = oracle(task)
    found = Predictor(model)(scene.image, window_px=256, batch_size=4, score_thresh=0)
    assert max(model.batch_sizes) == 4
    expected = Predictor(oracle(task))(scene.image, window_px=256, score_thresh=0)
    if task == "detection":
        assert np.array_equal(found.boxes, expected.boxes)
    else:
        assert np.array_equal(found.label, expected.label)
