"""What the web demo computes."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.models import build_backbone
from spatial_mamba_d2.prediction import Predictor, load_predictor
from spatial_mamba_d2.serving import demo as demo_module
from spatial_mamba_d2.serving.demo import COLUMNS, DEMOS, Demo, find_weights
from tests.prediction.conftest import CLASSES
from tests.serving.conftest import as_label

TASKS = tuple(COLUMNS)


@pytest.fixture
def demo(predictor):
    built = Demo(predictor(task) for task in TASKS)
    yield built
    built.close()


@pytest.fixture
def photo(truth, file_of, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(file_of(truth.image))
    return path


@pytest.mark.parametrize("task", TASKS)
def test_a_result_is_shown_and_can_be_downloaded(demo, photo, truth, task):
    shown = demo.predict(task, photo, score_thresh=0.0)
    assert (shown.drawing == 255 - truth.image).all()  # as the stub draws
    assert all(len(row) == len(COLUMNS[task]) for row in shown.rows) and shown.rows
    assert "48 x 64 pixels" in shown.summary
    assert all(path.is_file() for path in shown.files)
    by_suffix = {path.suffix: path for path in shown.files}
    assert (read_image(shown.files[-1]) == shown.drawing).all()
    if task == "detection":
        content = json.loads((shown.files[0]).read_text())
        assert len(content["annotations"]) == truth.num_objects
        assert content["images"][0]["file_name"] == "photo.png"  # not where the upload is
        features = json.loads(by_suffix[".geojson"].read_text())["features"]
        assert len(features) == truth.num_objects
    if task == "segmentation":
        label = read_image(shown.files[0], num_channels=1)[..., 0]
        assert (label == as_label(truth)).all()
        pixels = [int(row[1]) for row in shown.rows]
        assert sum(pixels) == label.size and pixels == sorted(pixels, reverse=True)
    with by_suffix[".csv"].open() as file:
        assert {row["image"] for row in csv.DictReader(file)} == {"photo.png"}


@pytest.mark.parametrize("task", TASKS)
def test_checkpoints_are_shown(task, checkpoint, photo, truth):
    """What is shown is what real, if small, models predict; and they have an inside."""
    needed = "detectron2" if task == "detection" else "lightning"
    pytest.importorskip(needed, reason=f"{needed} is not installed")
    predict = load_predictor(checkpoint(task), device="cpu")
    demo, expected = Demo([predict]), predict(photo, score_thresh=0.0)
    shown = demo.predict(task, photo, score_thresh=0.0)
    assert shown.drawing.dtype == np.uint8 and shown.drawing.shape[2] == 3
    assert {row[0] for row in shown.rows} <= set(CLASSES[task]) and shown.rows
    if task == "segmentation":
        label = read_image(shown.files[0], num_channels=1)[..., 0]
        assert (label == expected.label).all()
        assert sum(int(row[1]) for row in shown.rows) == truth.numbers.size
    elif task == "classification":
        assert shown.rows == [[name, f"{score:.1%}"] for name, score in expected.top()]
    else:
        assert sum(int(row[1]) for row in shown.rows) == len(expected)
    assert all(drawing.std() > 10 for drawing in demo.look_inside(task, photo, stage=1, block=1))
    demo.close()


def test_thresholds_and_classes_choose(demo, photo, truth):
    everything = demo.predict("detection", photo, score_thresh=0.0)
    one = everything.rows[0][0]
    chosen = demo.predict("detection", photo, score_thresh=0.0, names=[one])
    assert chosen.rows == everything.rows[:1]
    none = demo.predict("detection", photo, score_thresh=1.0)
    assert none.rows == [] and none.summary.startswith("0 objects")
    label = demo.predict("segmentation", photo, score_thresh=0.0, names=["bar"]).files[0]
    found = read_image(label, num_channels=1)[..., 0]
    assert (found == np.where(as_label(truth) == 1, 1, 255)).all()


def test_a_large_image_goes_by_windows(demo, truth, tmp_path):
    large = np.tile(truth.image, (4, 4, 1))
    path = tmp_path / "large.png"
    cv2.imwrite(str(path), large[..., ::-1])
    label = demo.predict("segmentation", path, score_thresh=0.0, window_px=64).files[0]
    assert (read_image(label, num_channels=1)[..., 0] == np.tile(as_label(truth), (4, 4))).all()


def test_what_is_too_large_is_not_drawn(demo, photo, monkeypatch):
    monkeypatch.setattr(demo_module, "_MOST_DRAWN_PX", 1000)
    shown = demo.predict("detection", photo, score_thresh=0.0)
    assert shown.drawing is None and "too large to be drawn" in shown.summary
    assert [path.suffix for path in shown.files] == [".json", ".geojson", ".csv"]


def test_a_bad_file_is_named_without_its_folder(demo, tmp_path):
    path = tmp_path / "bad.png"
    path.write_text("no image")
    with pytest.raises(ValueError, match="image file bad.png cannot be decoded") as caught:
        demo.predict("detection", path, score_thresh=0.5)
    assert str(tmp_path) not in str(caught.value)


def test_only_the_last_results_are_kept(demo, photo, monkeypatch):
    monkeypatch.setattr(demo_module, "_NUM_KEPT", 2)
    first, *others = (demo.predict("classification", photo, score_thresh=0.5) for _ in range(3))
    assert not first.files[0].exists() and all(each.files[0].exists() for each in others)
    demo.close()
    assert not others[0].files[0].exists()


def test_the_inside_of_a_model(predictor, photo):
    class Network:
        """What the predictors of the tasks look like."""

        def __init__(self):
            torch.manual_seed(0)
            self.model = build_backbone("tiny", embed_dim=16, depths=(1, 2, 1, 1)).eval()

    stub = predictor("segmentation")
    stub.model.predictor = Network()
    demo = Demo([stub])
    states, fields = demo.look_inside("segmentation", photo, stage=2, block=2)
    for drawing in (states, fields):
        assert drawing.dtype == np.uint8 and drawing.shape[2] == 3 and drawing.std() > 10
    with pytest.raises(ValueError, match=r"block must be 1..2 in stage 2, got 3"):
        demo.look_inside("segmentation", photo, stage=2, block=3)


def test_exported_files_have_no_inside(demo, photo):
    with pytest.raises(ValueError, match="must have a Spatial-Mamba backbone in PyTorch"):
        demo.look_inside("detection", photo, stage=1, block=1)


def test_the_demos_are_found_or_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python3 dev.py demo, python3 dev.py demo-seg"):
        find_weights([])
    path = DEMOS["segmentation"][0]
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_weights([]) == [path]
    assert find_weights([tmp_path / "x.pth"]) == [tmp_path / "x.pth"]


def test_one_model_of_each_task(predictor):
    with pytest.raises(ValueError, match="different tasks, got two of detection"):
        Demo([predictor(), predictor()])
    demo = Demo([predictor("segmentation")])
    assert demo.tasks == ["segmentation"]
    assert demo.missing() == [
        "detection: `python3 dev.py demo`", "classification: `python3 dev.py demo-cls`"
    ]  # fmt: skip
    assert isinstance(demo.predictors["segmentation"], Predictor)
