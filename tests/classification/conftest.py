"""Class folders small enough for tests of behaviour."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed")


@pytest.fixture
def overrides(sample_images, test_variant, tmp_path) -> list[str]:
    """``KEY VALUE`` pairs that put the recipe onto the small data and model, on the CPU."""
    pairs = {
        "DATASETS.ROOT": sample_images,
        "OUTPUT_DIR": tmp_path / "output",
        "MODEL.DEVICE": "cpu",
        "MODEL.SPATIAL_MAMBA.VARIANT": test_variant,
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
