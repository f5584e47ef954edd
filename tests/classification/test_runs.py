"""What ends a training of the classifier early, and the moving average then."""

from __future__ import annotations

import math
import signal

import pytest
import torch

from spatial_mamba_d2.classification.data import ClassificationData
from spatial_mamba_d2.classification.module import Classifier
from spatial_mamba_d2.classification.train import run
from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.system.stopping import Stopped


def test_a_folder_in_use_is_refused_before_data_are_read(arguments, tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("read")

    monkeypatch.setattr(ClassificationData, "setup", never)
    (tmp_path / "output").mkdir()
    (tmp_path / "output/config.yaml").write_text("SEED: 0")
    with pytest.raises(ValueError, match=r"holds another training \(config.yaml\)"):
        run(arguments())


def test_what_is_not_finite_reaches_neither_weights_nor_average(arguments, tmp_path, monkeypatch):
    """At iteration 4; then resumed, stopped by a signal, and resumed with another length."""
    step = Classifier.training_step

    def spoiled(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        return loss * math.nan if self.trainer.global_step == 4 else loss

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", spoiled)
        with pytest.raises(FloatingPointError, match="at iteration 4: not finite: the norm of"):
            run(arguments())
    last = tmp_path / "output/last.ckpt"
    content = read_checkpoint(last)
    assert content["global_step"] == 3
    for key in ("state_dict", "training_model"):
        assert all(torch.isfinite(value).all() for value in content[key].values())

    def signalling(self, batch, batch_idx):
        if self.trainer.global_step == 6:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Classifier, "training_step", signalling)
        run(arguments(resume=True))
    assert stopped.value.code == 143
    assert read_checkpoint(last)["global_step"] == 7
    with pytest.raises(ValueError, match="SOLVER.EPOCHS must be at least the 7 .*got 6 iterations"):
        run(arguments("SOLVER.EPOCHS", 2, resume=True))
