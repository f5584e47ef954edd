"""``tools/predict.py`` with a trained-like detector, in a process of its own."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")


@pytest.mark.slow
def test_the_tool(run_tool, shapes, tmp_path):
    from spatial_mamba_d2.models import build_classifier

    torch.manual_seed(0)
    content = {"model": build_classifier("tiny", 1000).state_dict()}
    torch.save(content, tmp_path / "weights.pth")
    done = run_tool(
        "predict.py", "--weights", tmp_path / "weights.pth",
        "--input", shapes / "images/validation", "--output", tmp_path / "out",
        "--format", "csv,png", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "5 of 5 images are in" in done.stdout
    assert json.loads((tmp_path / "out/summary.json").read_text())["images"] == 5
    assert len(list((tmp_path / "out/png").glob("*.png"))) == 5
