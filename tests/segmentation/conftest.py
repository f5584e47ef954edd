"""A segmentor and data small enough for tests of behaviour."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed")


@pytest.fixture
def overrides(shapes, test_variant, tmp_path) -> list[str]:
    """``KEY VALUE`` pairs that put the defaults onto the small data and model, on the CPU."""
    pairs = {
        "DATASETS.ROOT": shapes,
        "OUTPUT_DIR": tmp_path / "output",
        "MODEL.DEVICE": "cpu",
        "MODEL.SPATIAL_MAMBA.VARIANT": test_variant,
        "MODEL.UPERNET.CHANNELS": 16,
        "MODEL.UPERNET.AUX_CHANNELS": 8,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.SHORT_PX": 64,
        "INPUT.LONG_PX": 128,
        "INPUT.CROP_PX": 48,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.BASE_LR": 1e-3,
        "SOLVER.MAX_ITER": 6,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "TEST.PICTURES": 0,
    }
    return [str(word) for pair in pairs.items() for word in pair]
