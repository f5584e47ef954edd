"""Fine-tunings of a narrow model on a few images, from a folder to checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spatial_mamba_d2.finetuning import finetune
from spatial_mamba_d2.models.variants import VARIANTS
from tests.conftest import TEST_VARIANT, unchanged_loggers
from tests.data.conftest import shape_source  # noqa: F401

TASKS = ("detection", "segmentation", "classification")
NARROW = ("MODEL.SPATIAL_MAMBA.VARIANT", "test")
# Fast on a CPU, whatever is learned
SMALL = {
    "detection": (
        *NARROW,
        "INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48", "TEST.PICTURES", "0",
        "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    ),
    "segmentation": (
        *NARROW, "INPUT.SHORT_PX", "48", "INPUT.CROP_PX", "32", "TEST.PICTURES", "0",
    ),
    "classification": (*NARROW, "INPUT.CROP_PX", "32", "TEST.SHORT_PX", "36"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def narrow_variant() -> Iterator[None]:
    """What ``NARROW`` names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "test", TEST_VARIANT)
        yield


@pytest.fixture(scope="module")
def runs(narrow_variant, shapes, sample_images, tmp_path_factory) -> dict[str, Path]:
    """The folder of a run of each task."""
    folder = tmp_path_factory.mktemp("runs")
    with unchanged_loggers():
        for task in TASKS:
            data = sample_images if task == "classification" else shapes
            finetune(data, None, folder / task, task=task, epochs=2, overrides=SMALL[task])
    return {task: folder / task for task in TASKS}
