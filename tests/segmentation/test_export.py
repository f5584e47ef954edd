"""UPerNet as a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"{_package} (extra export) is not installed")

from spatial_mamba_d2 import deploy
from spatial_mamba_d2.export import formats
from spatial_mamba_d2.export.exportable import Tolerance
from spatial_mamba_d2.models import build_upernet
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.export import compare_maps
from spatial_mamba_d2.segmentation.predict import Predictor

NAMES = ["background", "circle", "square", "triangle", "star", "cross"]


@pytest.fixture
def weights(test_variant, filled_state, tmp_path):
    path = tmp_path / "upernet.pth"
    state = filled_state(build_upernet(test_variant, 6, channels=16, aux_channels=8))
    palette = [[i, 2 * i, 255 - i] for i in range(6)]
    torch.save({"state_dict": state, "classes": NAMES, "palette": palette}, path)
    return path


@pytest.mark.parametrize("result", ["labels", "probabilities"])
def test_onnx(result, weights, root, overrides, tmp_path):
    """One image is fitted into the frame of the configuration, so that the predictor agrees."""
    path, config = tmp_path / "model.onnx", root / "configs/demo_upernet_spatial_mamba_t.yaml"
    words = [*overrides, "MODEL.NUM_CLASSES", "6"]
    metadata = deploy.export_model(
        weights, "onnx", path, config_file=config, overrides=words, result=result
    )
    assert metadata["outputs"] == [result] and metadata["palette"][2] == [2, 4, 253]
    assert metadata["resize"] == {"filter": "bilinear", "short_px": 64, "long_px": 128}
    predictor = Predictor(load_config(config, [*words, "MODEL.WEIGHTS", str(weights)]))
    image = np.random.default_rng(0).integers(0, 256, (64, 83, 3), np.uint8)
    found = formats.open_file(path, "onnx")(image[None])[result][0]
    labels = found if result == "labels" else found.argmax(0)
    assert np.mean(labels == predictor(image)) > 0.999


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
