"""Checkpoints: what is loaded, what is refused, and that none is ever half written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch
from detectron2.modeling import build_model

from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer, load_detector_weights
from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.models.checkpoints.loading import WeightsError, read_checkpoint, to_official

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def model(make_cfg):
    return build_model(make_cfg())


def test_official_classifier_fills_the_backbone(model, tmp_path):
    classifier = build_classifier("tiny")
    path = tmp_path / "imagenet.pth"
    torch.save({"model": {to_official(k): v for k, v in classifier.state_dict().items()}}, path)
    report = load_detector_weights(model, path)
    weight = "stages.2.blocks.0.ssm.in_proj.weight"
    assert torch.equal(
        model.state_dict()[f"backbone.bottom_up.{weight}"], classifier.state_dict()[weight]
    )
    assert all(name.startswith("backbone.bottom_up.") for name in report.loaded)
    assert sorted(report.loaded + report.new) == sorted(model.state_dict())
    assert any("roi_heads" in name for name in report.new)
    assert "not used (4): norm.*, head.*" in str(report)


def test_own_detector_and_other_classes(model, make_cfg, tmp_path):
    path = tmp_path / "detector.pth"
    torch.save({"model": model.state_dict()}, path)
    other = build_model(make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 3))
    with pytest.raises(WeightsError, match=r"cls_score.weight is \[6, 256\], must be \[4, 256\]"):
        load_detector_weights(other, path)
    skip = ("roi_heads.box_predictor", "roi_heads.mask_head.predictor")
    report = load_detector_weights(other, path, skip=skip)
    assert len(report.new) == 6 and all(name.startswith(skip) for name in report.new)


def test_wrong_variant_is_refused(model, tmp_path):
    wide = build_classifier("tiny", embed_dim=32)
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(WeightsError, match="another variant"):
        load_detector_weights(model, tmp_path / "wide.pth")


def test_save_and_resume(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    saver = SafeCheckpointer(model, str(tmp_path), classes=["a", "b"], optimizer=optimizer)
    saver.save("model_0000004", iteration=4)
    assert saver.get_checkpoint_file() == str(tmp_path / "model_0000004.pth")
    assert read_checkpoint(tmp_path / "model_0000004.pth")["classes"] == ["a", "b"]
    fresh = torch.optim.AdamW(model.parameters(), lr=1.0)
    rest = SafeCheckpointer(model, str(tmp_path), optimizer=fresh).resume_or_load("", resume=True)
    assert rest == {"iteration": 4}
    assert fresh.param_groups[0]["lr"] == 0.25


def test_interrupted_write_leaves_the_old_checkpoint(model, tmp_path, monkeypatch):
    saver = SafeCheckpointer(model, str(tmp_path))
    saver.save("model_0000001", iteration=1)

    def half(content, path):
        path.write_bytes(b"PK half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    for name in ("model_0000002", "model_0000001"):
        with pytest.raises(KeyboardInterrupt):
            saver.save(name, iteration=2)
    monkeypatch.undo()
    assert saver.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert not (tmp_path / "model_0000002.pth").exists()
    assert read_checkpoint(tmp_path / "model_0000001.pth")["iteration"] == 1


PROGRAM = """
import sys, torch
from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer

model = torch.nn.Linear(1500, 1500)
saver = SafeCheckpointer(model, sys.argv[1])
number = 0
while True:
    number += 1
    saver.save(f"model_{number % 3}", iteration=number)
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_kill_at_any_moment_loses_at_most_one_checkpoint(tmp_path):
    for delay_ms in (0, 3, 7, 13, 29):
        folder = tmp_path / str(delay_ms)
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        while (line := process.stdout.readline().strip()) != "4":
            assert line or process.poll() is None, "the program ended by itself"
        time.sleep(delay_ms / 1000)
        process.send_signal(signal.SIGKILL)
        written = [4, *map(int, process.communicate()[0].split())]
        name = (folder / "last_checkpoint").read_text()
        iteration = read_checkpoint(folder / name)["iteration"]
        assert iteration >= written[-1]
