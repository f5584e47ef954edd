"""A segmentor and data small enough for tests of behaviour."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed")

from spatial_mamba_d2.data.shapes import generate_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """12 training and 5 test images of 64 to 96 pixels."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, num_train=12, num_val=5, image_px=(64, 96))


@pytest.fixture
def overrides(shapes, tmp_path) -> list[str]:
    """``KEY VALUE`` pairs that put the defaults onto the small data, on the CPU."""
    pairs = {
        "DATASETS.ROOT": shapes,
        "OUTPUT_DIR": tmp_path / "output",
        "MODEL.DEVICE": "cpu",
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
