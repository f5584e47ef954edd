"""The classifier as a file; ``tests/examples/test_onnx_runner.py`` has one in ONNX."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatial_mamba_d2 import deploy
from spatial_mamba_d2.classification.config import load_config
from spatial_mamba_d2.classification.export import ExportableClassifier, compare_probabilities
from spatial_mamba_d2.classification.predict import Predictor
from spatial_mamba_d2.export import checks, formats
from spatial_mamba_d2.export.exportable import Tolerance
from spatial_mamba_d2.export.portable import portable_copy
from spatial_mamba_d2.models import build_classifier

NAMES = ["circle", "square", "triangle", "star", "cross"]


@pytest.fixture
def weights(test_variant, filled_state, tmp_path):
    path = tmp_path / "classifier.pth"
    state = filled_state(build_classifier(test_variant, len(NAMES)))
    torch.save({"state_dict": state, "classes": NAMES}, path)
    return path


@pytest.fixture
def export(root, overrides, weights, tmp_path):
    """``export(format, **arguments)``: metadata and path of an exported file."""

    def run(format, **arguments):
        path = tmp_path / f"exported/model{formats.SUFFIXES[format]}"
        config = root / "configs/demo_spatial_mamba_t.yaml"
        arguments = {"config_file": config, "overrides": overrides, **arguments}
        return deploy.export_model(weights, format, path, **arguments), path

    return run


def test_the_function_equals_the_predictor(overrides, weights):
    """With the crop in the middle of the image outside of the function, as documented."""
    words = [*overrides, "MODEL.WEIGHTS", str(weights), "TEST.SHORT_PX", "36"]
    cfg = load_config(None, words)
    predictor = Predictor(cfg)
    statistics = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    function = ExportableClassifier(portable_copy(predictor.model), *statistics)
    image = np.random.default_rng(0).integers(0, 256, (36, 40, 3), np.uint8)
    with torch.no_grad():
        (found,) = function(torch.from_numpy(image[None, :, 2:38]))
    assert np.allclose(found[0], predictor(image), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_graph_of_pytorch_for_one_size(export, caplog):
    with caplog.at_level("INFO", "spatial_mamba_d2"):
        metadata, path = export("pt2", size=(36, 36))
    assert "compared with PyTorch on 5 inputs (1x36x36x3), 5 results" in caplog.text
    assert [p.name for p in path.parent.iterdir()] == ["model.pt2"]
    assert metadata["inputs"] == {"image": {"dtype": "uint8", "shape": [1, 36, 36, 3]}}
    assert metadata["classes"] == NAMES and metadata["resize"]["crop_px"] == 36
    assert len(metadata["weights"]["sha256"]) == 64
    assert formats.open_file(path, "pt2").metadata == metadata
    with pytest.raises(ValueError, match="output: 1 files exist already"):
        export("pt2", size=(36, 36))


def test_a_file_that_is_wrong_is_not_written(export, monkeypatch, tmp_path):
    identity = torch.export.export(torch.nn.Identity(), (torch.zeros(2),))
    monkeypatch.setattr(formats, "trace", lambda *_, **__: identity)
    uniform = np.full((1, len(NAMES)), 1 / len(NAMES), np.float32)

    def open_file(path, *_):
        return formats.ExportedFile(path, lambda image: [uniform], ["probabilities"], files[path])

    def write(*args):
        files[args[3]] = args[4]
        args[3].touch()
        return [args[3]]

    files = {}
    monkeypatch.setattr(formats, "write", write)
    monkeypatch.setattr(formats, "open_file", open_file)
    with pytest.raises(checks.ExportError, match=r"differs from PyTorch .* probabilities"):
        export("pt2", size=(48, 48))
    assert list((tmp_path / "exported").iterdir()) == []


def test_differences_are_seen():
    expected = {"probabilities": np.array([[0.5, 0.3, 0.2], [0.5004, 0.4996, 0.0]], np.float32)}
    swapped = {"probabilities": expected["probabilities"] + np.float32([[0, 0, 0], [-4e-5, 0, 0]])}

    def accepted(found):
        return all(d.is_accepted for d in compare_probabilities(expected, found, Tolerance()))

    assert accepted(expected) and accepted(swapped)
    assert not accepted({"probabilities": expected["probabilities"] + 1e-3})
    assert not accepted({"probabilities": expected["probabilities"][:1]})
    assert not accepted({"probabilities": expected["probabilities"] * np.nan})


@pytest.mark.parametrize(
    ("format", "arguments", "message"),
    [
        ("tflite", {}, "format must be one of onnx, openvino, pt2, aoti, got 'tflite'"),
        ("pt2", {"precision": "fp16"}, "precision must be fp32 for pt2, got 'fp16': PyTorch would"),
        ("pt2", {"size": (0, 5)}, r"size must be H W, both above 0, got \[0, 5\]"),
        ("pt2", {"result": "labels"}, "result is for UPerNet only, got 'labels'"),
        ("pt2", {"size": (48, 64)}, r"size of a classifier must be square, got \[48, 64\]"),
    ],
)
def test_wrong_arguments(format, arguments, message, export, monkeypatch):
    monkeypatch.setitem(formats.SUFFIXES, "tflite", ".tflite")
    with pytest.raises(ValueError, match=message):
        export(format, **arguments)


def test_the_file_must_have_the_suffix_of_its_format(weights, tmp_path):
    with pytest.raises(ValueError, match=r"output must end with .pt2 for pt2, got .*model.onnx"):
        deploy.export_model(weights, "pt2", tmp_path / "model.onnx")


def test_a_missing_package_is_named(export, monkeypatch):
    monkeypatch.setitem(formats._PACKAGES, "onnx", ("torch", "no_such_package"))
    with pytest.raises(
        ImportError, match=r"no_such_package: pip install 'spatial-mamba-d2\[export"
    ):
        export("onnx")
