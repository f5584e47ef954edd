"""Classification of single images."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from spatial_mamba_d2.classification.config import load_config
from spatial_mamba_d2.classification.predict import Predictor, build_draw
from spatial_mamba_d2.data.images import read_image, visualize_images
from spatial_mamba_d2.models import build_backbone, build_classifier


@pytest.fixture
def weights(test_variant, tmp_path):
    torch.manual_seed(0)
    model = build_classifier(test_variant, 5)
    path = tmp_path / "classifier.pth"
    torch.save({"model": model.state_dict(), "classes": ["a", "b", "c", "d", "e"]}, path)
    return path


def test_probabilities(overrides, weights, sample_images):
    predictor = Predictor(load_config(None, [*overrides, "MODEL.WEIGHTS", str(weights)]))
    assert predictor.classes == ("a", "b", "c", "d", "e")
    image = read_image(next((sample_images / "val/star").iterdir()))
    probabilities = predictor(image)
    assert probabilities.shape == (5,) and probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert not np.allclose(probabilities, predictor(255 - image))


def test_a_folder_with_a_broken_image(overrides, weights, sample_images, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    words = [*overrides, "MODEL.WEIGHTS", str(weights)]
    inputs = [sample_images / "val/star", broken]
    drawings = visualize_images(inputs, tmp_path / "drawn", partial(build_draw, None, words))
    assert len(drawings) == 3
    assert all(read_image(path).shape == (240 + 5 * 20, 240, 3) for path in drawings)
    assert "3 images in" in capsys.readouterr().out


def test_weights_must_be_a_classifier(overrides, test_variant, tmp_path):
    with pytest.raises(ValueError, match="MODEL.WEIGHTS must name a checkpoint"):
        Predictor(load_config(None, overrides))
    torch.save(build_backbone(test_variant).state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="backbone.pth does not fit SpatialMambaClassifier"):
        Predictor(load_config(None, [*overrides, "MODEL.WEIGHTS", str(tmp_path / "backbone.pth")]))
