"""Segmentation in an environment without Detectron2, OpenMMLab and pycocotools."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("detectron2", "mmcv", "mmengine", "mmseg", "pycocotools"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from spatial_mamba_d2.models.variants import VARIANTS

VARIANTS["test"] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.1}
sys.path.insert(0, "tools")
import train_seg, visualize_seg

output, images, words = sys.argv[1], sys.argv[2], sys.argv[3:]
weights = ["MODEL.WEIGHTS", f"{output}/last.ckpt"]
for tool, arguments in (
    (train_seg, words),
    (train_seg, ["--eval-only", *words, *weights, "TEST.PROTOCOL", "ms"]),
    (visualize_seg, ["--config-file", "configs/demo_upernet_spatial_mamba_t.yaml",
                     "--input", images, "--output", f"{output}/demo", *words, *weights]),
):
    sys.argv[1:] = arguments
    tool.main()
assert "detectron2" not in sys.modules
"""


@pytest.mark.slow
def test_train_evaluate_and_visualize(root, overrides, shapes, tmp_path):
    images = shapes / "images/validation"
    words = [*overrides, "SOLVER.MAX_ITER", "2"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "output", images, *words],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mIoU" in done.stdout and "5 images in" in done.stdout
    assert (tmp_path / "output/scores_ms_whole.json").is_file()
