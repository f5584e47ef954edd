"""Checkpoints and exported files of all tasks: task, configuration and classes are recognised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="Lightning is not installed")
pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from spatial_mamba_d2 import deploy
from spatial_mamba_d2.export.formats import ExportedFile
from spatial_mamba_d2.models import build_backbone
from spatial_mamba_d2.models.inference_only import InferenceOnly
from spatial_mamba_d2.models.quantized import QuantizedLinear, why_not_int8
from spatial_mamba_d2.prediction import ClassScores, Detections, LabelMap, exported, load_predictor
from tests.prediction.conftest import CLASSES

IMAGE = np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8)
RESULTS = {"detection": Detections, "segmentation": LabelMap, "classification": ClassScores}


@pytest.mark.parametrize("task", RESULTS)
def test_a_checkpoint_is_enough(task, checkpoint, config_of):
    path = checkpoint(task)
    predict = load_predictor(path)
    assert predict.task == task and predict.names == tuple(CLASSES[task])
    result = predict(IMAGE, score_thresh=0)
    assert isinstance(result, RESULTS[task]) and result.image_size == (48, 80)
    # The settings are those of the training, not the defaults.
    other = load_predictor(path, overrides=list(map(str, changed_size(task))))
    assert not same(result, other(IMAGE, score_thresh=0))
    drawing = predict.model.draw(IMAGE, result)
    assert drawing.dtype == np.uint8 and drawing.shape[2] == 3


def changed_size(task):
    key = {"detection": "INPUT.MIN_SIZE_TEST", "segmentation": "INPUT.SHORT_PX",
           "classification": "INPUT.CROP_PX"}[task]  # fmt: skip
    return key, 36


def same(first, second):
    if isinstance(first, Detections):
        return np.array_equal(first.boxes, second.boxes)
    if isinstance(first, LabelMap):
        return np.array_equal(first.label, second.label)
    return np.array_equal(first.scores, second.scores)


@pytest.mark.parametrize("task", RESULTS)
def test_batches_give_the_results_of_single_images(task, checkpoint):
    predict = load_predictor(checkpoint(task))
    images = np.random.default_rng(1).integers(0, 255, (5, 48, 80, 3), np.uint8)
    others = [images[0], *images[1:, :40], IMAGE]  # batches of 1, 3, 1 and 1
    alone = [predict(image, score_thresh=0) for image in others]
    together = list(predict(others, score_thresh=0, batch_size=3))
    assert len(together) == len(alone)
    for first, second in zip(alone, together, strict=True):
        assert first.image_size == second.image_size
        if task == "detection":
            assert len(first) == len(second) > 0
            np.testing.assert_allclose(first.boxes, second.boxes, atol=1e-3)
        elif task == "segmentation":
            assert (first.label != second.label).mean() < 1e-3
        if task != "segmentation":
            np.testing.assert_allclose(first.scores, second.scores, atol=1e-5)
    if task == "segmentation":
        large = np.random.default_rng(2).integers(0, 255, (150, 220, 3), np.uint8)
        windows = {"window_px": 96, "overlap_px": 32}
        single = predict(large, **windows).label
        assert (predict(large, **windows, batch_size=4).label != single).mean() < 1e-3


@pytest.mark.parametrize("task", RESULTS)
def test_the_configuration_next_to_the_weights(task, checkpoint, config_of, tmp_path):
    alone = load_predictor(checkpoint(task))(IMAGE, score_thresh=0)
    path = checkpoint(task, with_config=False)
    (tmp_path / "config.yaml").write_text(config_of(task).dump())
    assert same(load_predictor(path)(IMAGE, score_thresh=0), alone)
    elsewhere = tmp_path / "moved" / "weights.pth"
    elsewhere.parent.mkdir()
    shutil.copy(path, elsewhere)
    given = load_predictor(elsewhere, config=tmp_path / "config.yaml")
    assert same(given(IMAGE, score_thresh=0), alone)


@pytest.mark.parametrize("task", RESULTS)
def test_sizes_of_a_published_model_come_from_its_parameters(task, checkpoint):
    path = checkpoint(task, with_config=False, with_names=task == "classification")
    predict = load_predictor(path, overrides=["MODEL.DEVICE", "cpu"])
    assert predict.task == task and len(predict.names) == len(CLASSES[task])


def test_published_classifier(official_state, tmp_path):
    path = tmp_path / "spatialmamba_tiny.pth"
    torch.save({"model": official_state("tiny")}, path)
    predict = load_predictor(path)
    assert predict.task == "classification" and "tench" in predict.names[0]
    assert predict(IMAGE).scores.sum() == pytest.approx(1, abs=1e-4)


def test_errors_name_the_file_and_what_is_wrong(checkpoint, tmp_path, test_variant):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_predictor(tmp_path / "absent.pth")
    path = checkpoint("classification")
    with pytest.raises(ValueError, match="task must be one of detection.*got 'pose'"):
        load_predictor(path, task="pose")
    with pytest.raises(FileNotFoundError, match="config: no such file: .*absent.yaml"):
        load_predictor(path, config=tmp_path / "absent.yaml")
    torch.save(build_backbone(test_variant).state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="backbone.pth holds a backbone without a head"):
        load_predictor(tmp_path / "backbone.pth")
    content = torch.load(path)
    content["config"] = "MODEL: {NUM_CLASES: 2}"
    torch.save(content, path)
    with pytest.raises(ValueError, match="classification.pth.*unknown config key MODEL.NUM_CLASES"):
        load_predictor(path)


def test_windows_through_real_models(checkpoint):
    image = np.tile(IMAGE, (3, 3, 1))
    detections = load_predictor(checkpoint("detection"))(image, window_px=96, score_thresh=0)
    assert detections.image_size == image.shape[:2]
    label = load_predictor(checkpoint("segmentation"))(image, window_px=96).label
    assert label.shape == image.shape[:2] and label.max() < 3
    with pytest.raises(ValueError, match="window_px .* has no meaning in classification"):
        load_predictor(checkpoint("classification"))(image, window_px=96)


@pytest.fixture
def load_exported(monkeypatch):
    """``load_exported(checkpoint)``: the predictor of an exported file, which PyTorch runs here."""

    def load(path, size=None, result=None, **changes):
        exportable, value_range = deploy.build_exportable(path, result=result)
        metadata = deploy.describe(exportable, value_range, path, size, {}) | changes

        def run(image):
            with torch.no_grad():
                return [x.numpy() for x in exportable.module(torch.from_numpy(image))]

        name = Path("model.onnx")
        file = ExportedFile(name, run, exportable.outputs, json.dumps(metadata))
        monkeypatch.setattr(exported, "open_file", lambda *_: file)
        return load_predictor(name)

    return load


@pytest.mark.parametrize("task", RESULTS)
def test_an_exported_file_predicts_what_its_checkpoint_does(task, checkpoint, load_exported):
    """Images of another size than the network's, and odd ones."""
    path = checkpoint(task)
    original = load_predictor(path)
    for result in ("labels", "probabilities") if task == "segmentation" else (None,):
        predict = load_exported(path, result=result)
        assert predict.task == task and predict.names == original.names
        for image in (IMAGE, np.ascontiguousarray(np.tile(IMAGE, (1, 2, 1))[:, :131])):
            expected, found = original(image, score_thresh=0), predict(image, score_thresh=0)
            assert isinstance(found, RESULTS[task]) and found.image_size == image.shape[:2]
            assert_near(found, expected, least_equal=0.999 if result == "probabilities" else 0.9)
        drawing = predict.model.draw(image, found)
        assert drawing.shape == original.model.draw(image, found).shape  # in random colours


def assert_near(found, expected, least_equal=1.0):
    if isinstance(expected, ClassScores):
        assert np.allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
    elif isinstance(expected, LabelMap):
        assert np.mean(found.label == expected.label) >= least_equal
    else:
        assert len(found) == len(expected) > 2
        assert np.allclose(found.boxes, expected.boxes, rtol=0, atol=0.01)
        assert np.array_equal(found.classes, expected.classes)
        assert np.mean(found.bitmaps() == expected.bitmaps()) > 0.999


def test_windows_through_exported_files(checkpoint, load_exported):
    image = np.tile(IMAGE, (3, 3, 1))
    for task in ("segmentation", "detection"):
        path = checkpoint(task)
        expected = load_predictor(path)(image, window_px=96, score_thresh=0)
        result = "probabilities" if task == "segmentation" else None
        predict = load_exported(path, result=result)
        assert_near(predict(image, window_px=96, score_thresh=0), expected, least_equal=0.999)
    with pytest.raises(ValueError, match="must have probabilities for windows .* got labels: expo"):
        load_exported(checkpoint("segmentation"))(image, window_px=96)


@pytest.mark.parametrize("task", RESULTS)
def test_an_exported_file_for_one_size(task, checkpoint, load_exported):
    """It gets images of that size, and results are in the frame of the original image."""
    predict = load_exported(checkpoint(task), size=(40, 40))
    assert predict.model.fit(IMAGE).shape == (40, 40, 3)
    assert predict(IMAGE, score_thresh=0).image_size == IMAGE.shape[:2]
    if task == "classification":  # the same part of the image as at 32 of 36 pixels
        assert predict.model.resize == {"filter": "bicubic", "short_px": 45, "crop_px": 40}
        with pytest.raises(
            ValueError, match=r"size of a classifier must be square, got \[40, 48\]"
        ):
            load_exported(checkpoint(task), size=(40, 48))


def test_errors_about_exported_files(checkpoint, load_exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="weights: no such file: .*absent.onnx"):
        load_predictor(tmp_path / "absent.onnx")
    path = checkpoint("classification")
    with pytest.raises(ValueError, match="model.onnx must be for a task of this package, got 'po"):
        load_exported(path, task="pose")
    with pytest.raises(ValueError, match="model.onnx has incomplete metadata: KeyError 'filter'"):
        load_exported(path, resize={})
    load_exported(path)
    for arguments, message in (
        ({"overrides": ["INPUT.CROP_PX", "32"]}, "overrides must be left out: model.onnx is expo"),
        ({"config": "x.yaml"}, "config must be left out: model.onnx is exported with its conf"),
        ({"optimize": "float32"}, "optimize must be left out: model.onnx is exported with its con"),
        ({"device": "cuda"}, "device must be cpu for the exported file model.onnx, got 'cuda'"),
        ({"task": "detection"}, "task must be classification, which model.onnx is for, got 'dete"),
    ):
        with pytest.raises(ValueError, match=message):
            load_predictor("model.onnx", **arguments)
    with pytest.raises(ValueError, match="model.onnx must be a file of tools/export_model.py"):
        _ = ExportedFile(Path("model.onnx"), None, (), "[]").metadata


def _scores(result):
    """What results of a task are compared by."""
    if isinstance(result, Detections):
        return result.boxes
    return result.label if isinstance(result, LabelMap) else result.scores


@pytest.mark.parametrize("task", RESULTS)
def test_optimised_networks(task, checkpoint):
    """Those of float32 predict the same; the others nearly so, which models' tests measure."""
    path = checkpoint(task)
    arguments = {"score_thresh": 0.0} if task == "detection" else {}
    expected = load_predictor(path)(IMAGE, **arguments)
    fast = load_predictor(path, optimize="float32")
    assert isinstance(fast.model.predictor.model, InferenceOnly)
    np.testing.assert_allclose(_scores(fast(IMAGE, **arguments)), _scores(expected), atol=1e-3)
    low = load_predictor(path, optimize="bfloat16")(IMAGE, **arguments)
    assert type(low) is type(expected)
    if not why_not_int8():
        eight = load_predictor(path, optimize="int8", calibration=[IMAGE, IMAGE[:40]])
        kinds = {type(module) for module in eight.model.predictor.model.modules()}
        assert QuantizedLinear in kinds
        assert type(eight(IMAGE, **arguments)) is type(expected)
        again = load_predictor(path, optimize="int8", calibration=iter([IMAGE, IMAGE[:40]]))
        np.testing.assert_array_equal(
            _scores(again(IMAGE, **arguments)), _scores(eight(IMAGE, **arguments))
        )


def test_what_optimisation_needs(checkpoint, monkeypatch):
    path = checkpoint("classification")
    for arguments, message in (
        ({"optimize": "int8"}, "calibration must be some images for int8, got None"),
        ({"optimize": "float32", "calibration": [IMAGE]}, "calibration must be left out for float"),
        ({"optimize": "int4"}, "optimize must be one of float32, bfloat16, int8, got 'int4'"),
        ({"calibration": [IMAGE]}, "optimize must be one of float32, bfloat16, int8, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            load_predictor(path, **arguments)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    with pytest.raises(RuntimeError, match="no VNNI instructions"):
        load_predictor(path, optimize="int8", calibration=IMAGE)
