"""Classification in an environment without Detectron2, OpenMMLab and pycocotools."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("detectron2", "mmcv", "mmengine", "mmpretrain", "pycocotools"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from spatial_mamba_d2.models.variants import VARIANTS

VARIANTS["test"] = {"embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.1}
sys.path.insert(0, "tools")
import train_cls, visualize_cls

words = sys.argv[1:]
for arguments in (words, ["--eval-only", *words]):
    sys.argv[1:] = arguments
    train_cls.main()
images, output = words[words.index("DATASETS.ROOT") + 1], words[words.index("OUTPUT_DIR") + 1]
sys.argv[1:] = ["--config-file", "configs/demo_spatial_mamba_t.yaml",
                "--input", f"{images}/val/star",
                "--output", f"{output}/drawn", *words, "MODEL.WEIGHTS", f"{output}/last.ckpt"]
visualize_cls.main()
assert "detectron2" not in sys.modules
"""


@pytest.mark.slow
def test_train_and_evaluate(root, overrides, tmp_path):
    words = [*overrides, "SOLVER.EPOCHS", "2"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "iteration 6: top1" in done.stdout and "best.ckpt: top1" in done.stdout
    assert (tmp_path / "output/scores_val.json").is_file()
    assert (
        len(list((tmp_path / "output/drawn").glob("*.png"))) == 3 and "3 images in" in done.stdout
    )
