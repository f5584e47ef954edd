"""A detector and data small enough for tests of behaviour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from spatial_mamba_d2.data.shapes import generate_shapes
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.datasets import resolve_datasets
from spatial_mamba_d2.models.variants import VARIANTS


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """12 training and 5 test images of 64 to 96 pixels."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, num_train=12, num_val=5, image_px=(64, 96))


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Makes the tiny variant narrow and shallow."""
    arguments = {"embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.1}
    monkeypatch.setitem(VARIANTS, "tiny", arguments)


@pytest.fixture
def overrides(shapes, tmp_path) -> list[str]:
    """``KEY VALUE`` pairs that put the demo configuration onto the small data."""
    pairs = {
        "DATASETS.TRAIN_JSON": shapes / "instances_train.json",
        "DATASETS.TRAIN_IMAGES": shapes / "images/training",
        "DATASETS.TEST_JSON": shapes / "instances_val.json",
        "DATASETS.TEST_IMAGES": shapes / "images/validation",
        "OUTPUT_DIR": tmp_path / "output",
        "MODEL.DEVICE": "cpu",
        "INPUT.MIN_SIZE_TRAIN": "(48, 64)",
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 6,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "TEST.PICTURES": 0,
    }
    return [str(word) for pair in pairs.items() for word in pair]


@pytest.fixture
def make_cfg(root, overrides) -> Callable:
    """``make_cfg(KEY, VALUE, ...)``: the small configuration, data sets resolved."""

    def make(*more: object):
        words = [*overrides, *(str(word) for word in more)]
        cfg = load_config(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml", words)
        cfg.defrost()
        resolve_datasets(cfg)
        cfg.freeze()
        return cfg

    return make
