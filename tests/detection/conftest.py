"""A detector and data small enough for tests of behaviour."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from spatial_mamba_d2.detection.config import load_config


@pytest.fixture
def overrides(shapes, test_variant, tmp_path) -> list[str]:
    """``KEY VALUE`` pairs that put the demo configuration onto the small data and model."""
    pairs = {
        "DATASETS.TRAIN_JSON": shapes / "instances_train.json",
        "DATASETS.TRAIN_IMAGES": shapes / "images/training",
        "DATASETS.TEST_JSON": shapes / "instances_val.json",
        "DATASETS.TEST_IMAGES": shapes / "images/validation",
        "OUTPUT_DIR": tmp_path / "output",
        "MODEL.DEVICE": "cpu",
        "MODEL.SPATIAL_MAMBA.VARIANT": test_variant,
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
    """``make_cfg(KEY, VALUE, ...)``: the small configuration."""

    def make(*more: object):
        words = [*overrides, *(str(word) for word in more)]
        return load_config(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml", words)

    return make
