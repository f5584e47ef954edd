"""UPerNet as a file."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from spatial_mamba_d2 import deploy
from spatial_mamba_d2.export import checks, formats
from spatial_mamba_d2.export.exportable import Tolerance
from spatial_mamba_d2.models import build_upernet
from spatial_mamba_d2.prediction import load_predictor
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.export import OUTPUTS, build_exportable, compare_maps
from spatial_mamba_d2.segmentation.predict import Predictor

NAMES = ["background", "circle", "square", "triangle", "star", "cross"]


@pytest.fixture
def weights(test_variant, filled_state, tmp_path):
    path = tmp_path / "upernet.pth"
    state = filled_state(build_upernet(test_variant, 6, channels=16, aux_channels=8))
    palette = [[i, 2 * i, 255 - i] for i in range(6)]
    torch.save({"state_dict": state, "classes": NAMES, "palette": palette}, path)
    return path


def test_the_function_equals_the_predictor(weights, overrides):
    """For an image that fills the frame of the configuration, 64 x 128."""
    cfg = load_config(None, [*overrides, "MODEL.WEIGHTS", str(weights)])
    image = np.random.default_rng(0).integers(0, 256, (64, 83, 3), np.uint8)
    expected = Predictor(cfg)(image)
    for output in OUTPUTS:
        exportable = build_exportable(cfg, output)
        with torch.no_grad():
            (found,) = exportable.module(torch.from_numpy(image[None]))
        labels = found[0] if output == "labels" else found[0].argmax(0)
        assert np.mean(labels.numpy() == expected) > 0.999
        answer = {output: found.numpy()}
        reference = exportable.reference(torch.from_numpy(image[None]))
        assert all(d.is_accepted for d in exportable.compare(reference, answer, Tolerance()))
    assert exportable.metadata["palette"][2] == [2, 4, 253]
    assert exportable.metadata["resize"] == {"filter": "bilinear", "short_px": 64, "long_px": 128}
    with pytest.raises(ValueError, match="output must be one of labels, probabilities, got 'mask'"):
        build_exportable(cfg, "mask")


@pytest.mark.slow
def test_files_for_onnxruntime_and_openvino(weights, root, overrides, tmp_path):
    """Compared in batches of 1, 2 and 5 images and in five sizes before it is written."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} (extra export) is not installed")
    path, config = tmp_path / "model.onnx", root / "configs/demo_upernet_spatial_mamba_t.yaml"
    arguments = {"config_file": config, "overrides": overrides, "result": "probabilities"}
    metadata = deploy.export_model(weights, "onnx", path, **arguments)
    assert metadata["outputs"] == ["probabilities"] and metadata["classes"] == NAMES
    assert metadata["protocol"].startswith("ss (whole; scales 1.0 of short side 64")

    image = np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8)
    expected = load_predictor(weights, config=config, overrides=overrides)(image).label
    assert np.mean(load_predictor(path)(image).label == expected) > 0.999
    if find_spec("openvino"):
        (file, _) = formats.convert_to_openvino(
            path, path.with_suffix(".xml"), json.dumps(metadata)
        )
        run = formats.open_file(file, "openvino")
        exportable, value_range = deploy.build_exportable(weights, **arguments)
        inputs = checks.check_images(exportable, None, value_range=value_range)
        checks.compare(exportable, run, inputs, formats.tolerance_of("fp32"))
        assert np.mean(load_predictor(file)(image).label == expected) > 0.999


def test_differences_are_seen():
    rng, tolerance = np.random.default_rng(0), Tolerance()
    logits = rng.normal(size=(2, 4, 5, 6))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = probabilities.argmax(1).astype(np.uint8)
    expected = {"probabilities": probabilities}

    def accepted(found):
        return all(d.is_accepted for d in compare_maps(expected, found, tolerance))

    assert accepted({"labels": labels}) and accepted(expected)
    wrong = labels.copy()
    wrong[0, 0, 0] = (wrong[0, 0, 0] + 1) % 4
    assert not accepted({"labels": wrong})
    assert not accepted({"labels": labels[:1]})
    assert not accepted({"probabilities": probabilities + 1e-3})
    assert not accepted({"probabilities": np.full_like(probabilities, np.nan)})
