"""The classifier as a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"{_package} (extra export) is not installed")

from spatial_mamba_d2 import deploy
from spatial_mamba_d2.classification.config import load_config
from spatial_mamba_d2.classification.predict import Predictor
from spatial_mamba_d2.export import checks, formats
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
        config = root / "configs/spatial_mamba_t.yaml"
        words = [*overrides, "MODEL.NUM_CLASSES", str(len(NAMES))]
        arguments = {"config_file": config, "overrides": words, **arguments}
        return deploy.export_model(weights, format, path, **arguments), path

    return run


def test_onnx(export, overrides, weights, shapes, caplog):
    with caplog.at_level("INFO", "spatial_mamba_d2"):
        metadata, path = export("onnx")
    assert "compared with PyTorch on 5 inputs (1x36x36x3, 2x131x97x3, 5x64x224x3" in caplog.text
    assert "probabilities, relative" in caplog.text
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert metadata["classes"] == NAMES and metadata["resize"]["crop_px"] == 36
    assert metadata["inputs"] == {"image": {"dtype": "uint8", "shape": ["B", "H", "W", 3]}}
    assert json.loads(formats.read_metadata(path, "onnx")) == metadata
    # Against the predictor itself, with its resizing
    words = [*overrides, "MODEL.NUM_CLASSES", "5", "MODEL.WEIGHTS", str(weights)]
    predictor = Predictor(load_config(None, words))
    image = np.random.default_rng(0).integers(0, 256, (36, 40, 3), np.uint8)
    found = formats.open_file(path, "onnx")(image[None, :, 2:38])["probabilities"][0]
    crop = load_config(None, [*words, "TEST.SHORT_PX", "36"])
    assert np.allclose(found, Predictor(crop)(image), atol=1e-5)
    assert predictor.classes == tuple(NAMES)


def test_a_graph_of_pytorch_for_one_size(export, tmp_path):
    metadata, path = export("pt2", size=(48, 64))
    assert metadata["inputs"]["image"]["shape"] == [1, 48, 64, 3]
    with pytest.raises(ValueError, match="output: 1 files exist already"):
        export("pt2", size=(48, 64))


def test_a_file_that_is_wrong_is_not_written(export, monkeypatch, tmp_path):
    write = formats.write

    def write_other(exportable, program, format, path, metadata):
        with torch.no_grad():
            program.state_dict["model.head.bias"][2] += 1e-2
        return write(exportable, program, format, path, metadata)

    # The weights are the original's, too: copy them before they are changed.
    trace = formats.trace

    def trace_copied(exportable, size):
        program = trace(exportable, size)
        program._state_dict = {k: v.detach().clone() for k, v in program.state_dict.items()}
        return program

    monkeypatch.setattr(formats, "trace", trace_copied)
    monkeypatch.setattr(formats, "write", write_other)
    with pytest.raises(checks.ExportError, match=r"differs from PyTorch .* probabilities"):
        export("pt2", size=(48, 64))
    assert list((tmp_path / "exported").iterdir()) == []


@pytest.mark.parametrize(
    ("format", "arguments", "message"),
    [
        ("tflite", {}, "format must be one of onnx, openvino, pt2, got 'tflite'"),
        ("onnx", {"size": (0, 5)}, r"size must be H W, both above 0, got \[0, 5\]"),
        ("onnx", {"result": "labels"}, "result is for UPerNet only, got 'labels'"),
        ("onnx", {"config_file": None}, "is of no published variant; give the configuration"),
    ],
)
def test_wrong_arguments(format, arguments, message, export, monkeypatch):
    monkeypatch.setitem(formats.SUFFIXES, "tflite", ".tflite")
    with pytest.raises(ValueError, match=message):
        export(format, **arguments)


def test_a_missing_package_is_named(export, monkeypatch):
    monkeypatch.setitem(formats._PACKAGES, "onnx", ("onnx", "no_such_package"))
    with pytest.raises(ImportError, match=r"no_such_package: pip install 'spatial-mamba-d2\[export"):
        export("onnx")
