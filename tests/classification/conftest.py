"""Class folders small enough for tests of behaviour."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed")

from spatial_mamba_d2.data.shape_classes import generate_shape_classes


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """5 training and 3 test pictures of each of 5 classes, 40 x 40."""
    folder = tmp_path_factory.mktemp("data") / "shape_classes"
    return generate_shape_classes(folder, num_train=5, num_val=3, image_px=40)


@pytest.fixture
def overrides(pictures, tmp_path) -> list[str]:
    """``KEY VALUE`` pairs that put the recipe onto the small data, on the CPU."""
    pairs = {
        "DATASETS.ROOT": pictures,
        "OUTPUT_DIR": tmp_path / "output",
        "MODEL.DEVICE": "cpu",
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.CROP_PX": 36,  # 2 x 2 positions in the last stage
        "TEST.SHORT_PX": 40,
        "SOLVER.IMS_PER_BATCH": 8,  # 3 iterations an epoch
        "SOLVER.BASE_LR": 0.064,
        "SOLVER.EPOCHS": 4,
        "SOLVER.WARMUP_EPOCHS": 1,
        "SOLVER.EMA_DECAY": 0.9,
        "TEST.EVAL_EPOCHS": 0,
    }
    return [str(word) for pair in pairs.items() for word in pair]
