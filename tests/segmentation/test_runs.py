"""How a training ends early and goes on: signals, numbers that are not finite, the best weights."""

from __future__ import annotations

import math
import re
import signal
import sys
from contextlib import contextmanager

import pytest
import torch

from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.segmentation import losses
from spatial_mamba_d2.segmentation.module import Segmentor
from spatial_mamba_d2.segmentation.train import run
from spatial_mamba_d2.system.stopping import Stopped


@contextmanager
def stopped(name, iteration, signum):
    """The signal comes in that method of the module, and ends the run with its exit code."""
    method = getattr(Segmentor, name)

    def wrapped(self, *args, **kwargs):
        if self.iteration == iteration:
            signal.raise_signal(signum)
        return method(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as ended:
        patch.setattr(Segmentor, name, wrapped)
        yield
    assert ended.value.code == 128 + signum


def test_signals_save_and_resuming_is_exact(arguments, tmp_path, curve, caplog):
    """In an iteration, then in an evaluation, which the resumed training makes up for."""
    more = ("SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 100)
    whole = run(arguments(*more, "OUTPUT_DIR", tmp_path / "whole"))
    last = tmp_path / "output/last.ckpt"
    with stopped("training_step", 0, signal.SIGINT):
        run(arguments(*more, resume=True))
    assert f"--resume: {tmp_path / 'output'} has no checkpoint; a new training" in caplog.text
    assert read_checkpoint(last)["global_step"] == 1
    assert f"SIGINT: the state after iteration 1 is in {last}; continue with --res" in caplog.text
    with stopped("validation_step", 2, signal.SIGTERM):
        run(arguments(*more, resume=True))
    assert not curve(tmp_path / "output", "mIoU")
    resumed = run(arguments(*more, resume=True))

    for key in ("loss", "lr", "mIoU"):
        expected = curve(tmp_path / "whole", key)
        assert curve(tmp_path / "output", key) == pytest.approx(expected, rel=1e-6)
    assert resumed == pytest.approx(whole, rel=1e-6)
    for name in ("last", "best"):
        contents = [read_checkpoint(tmp_path / run / f"{name}.ckpt") for run in ("whole", "output")]
        assert contents[0]["global_step"] == contents[1]["global_step"]
        for key, value in contents[0]["state_dict"].items():
            torch.testing.assert_close(contents[1]["state_dict"][key], value, rtol=1e-5, atol=1e-6)
    scores = curve(tmp_path / "output", "mIoU")
    assert contents[1]["best_score"] == pytest.approx(max(scores.values()))
    log = (tmp_path / "output/log.txt").read_text()
    assert "iter: 0  loss: " in log and "iter: 3  loss: " in log  # all runs of the training


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resuming_with_other_accumulation(before, after, arguments, tmp_path, curve, monkeypatch):
    """After an odd iteration: each one has its own micro-batches, and their evaluations."""
    more = ("SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "SOLVER.ACCUMULATION_STEPS")
    with stopped("training_step", 0, signal.SIGINT):
        run(arguments(*more, before))
    micro_batches, step = [], Segmentor.training_step

    def counted(self, batch, batch_idx):
        micro_batches.append((self.trainer.global_step, batch_idx % after, len(batch[0])))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Segmentor, "training_step", counted)
    run(arguments(*more, after, resume=True))
    assert micro_batches == [(i, k, 4 // after) for i in (1, 2, 3) for k in range(after)]
    assert list(curve(tmp_path / "output")) == [0, 1, 2, 3]
    assert list(curve(tmp_path / "output", "mIoU")) == [1, 3]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_training(where, arguments, tmp_path, monkeypatch):
    """At iteration 4, after the checkpoint at 3, which stays; nothing is evaluated."""
    original = losses.cross_entropy
    calls = []

    def spoiled(*args):
        loss = original(*args)
        calls.append(loss)
        if len(calls) <= 2 * 4:  # two losses an iteration
            return loss
        if where == "loss":
            return loss * math.nan
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(losses, "cross_entropy", spoiled)
    monkeypatch.setattr(Segmentor, "validation_step", None)
    named = "loss, loss_decode, loss_aux" if where == "loss" else "the norm of the gradients"
    last = tmp_path / "output/last.ckpt"
    message = f"diverged at iteration 4: not finite: {named}.*Last good checkpoint: {last}"
    with pytest.raises(FloatingPointError, match=message):
        run(arguments())
    content = read_checkpoint(last)
    assert content["global_step"] == 3
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())
    assert "ended by FloatingPointError: training dive" in (tmp_path / "output/log.txt").read_text()


def test_weights_that_are_not_finite_are_neither_saved_nor_scored(arguments, tmp_path):
    """Set by the step after finite gradients, and in a file."""
    step = Segmentor.optimizer_step

    def spoiling(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if self.trainer.global_step >= 5:
            with torch.no_grad():
                self.model.decode_head.classify.bias[0] = math.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmentor, "optimizer_step", spoiling)
        with pytest.raises(
            FloatingPointError, match="after iteration 6: 1 .*decode_head.classify.b"
        ):
            run(arguments())
    assert read_checkpoint(tmp_path / "output/last.ckpt")["global_step"] == 3
    assert not (tmp_path / "output/best.ckpt").exists()

    last = tmp_path / "output/last.ckpt"
    content = read_checkpoint(last)
    content["state_dict"]["decode_head.classify.bias"][0] = math.nan
    torch.save(content, last)
    message = "last.ckpt: 1 tensors have values that are not finite, such as decode_head.classify.b"
    with pytest.raises(FloatingPointError, match=message):
        run(arguments(resume=True))
    with pytest.raises(ValueError, match="last.ckpt holds numbers that are not finite, in 1 of"):
        run(arguments("MODEL.WEIGHTS", last, eval_only=True))


def test_resuming_is_refused_before_anything_is_rewritten(arguments, tmp_path, caplog):
    output = tmp_path / "output"
    run(arguments("SOLVER.MAX_ITER", 2))
    files = {path: path.read_bytes() for path in output.glob("*.*") if path.name != "log.txt"}
    assert {"config.yaml", "metrics.json", "last.ckpt", "best.ckpt"} <= {p.name for p in files}
    with pytest.raises(ValueError, match="holds another training .*--resume"):
        run(arguments("SOLVER.MAX_ITER", 2))
    with pytest.raises(ValueError, match="another network: .* MODEL.UPERNET.CHANNELS was 16, is 8"):
        run(arguments("MODEL.UPERNET.CHANNELS", 8, resume=True))
    with pytest.raises(ValueError, match="MAX_ITER must be at least the 2 iterations .*got 1"):
        run(arguments("SOLVER.MAX_ITER", 1, resume=True))
    (output / "last.ckpt").rename(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"holds another .*\(best.ckpt\), but no last.ckpt"):
        run(arguments("SOLVER.MAX_ITER", 2, resume=True))
    torch.save({"state_dict": {}}, output / "last.ckpt")
    with pytest.raises(ValueError, match="last.ckpt is no checkpoint of a training: global_step,"):
        run(arguments("SOLVER.MAX_ITER", 2, resume=True))
    (tmp_path / "last.ckpt").rename(output / "last.ckpt")
    torch.save({"state_dict": {}}, output / "best.ckpt")
    with pytest.raises(ValueError, match="best.ckpt is no checkpoint of a training: best_score"):
        run(arguments("SOLVER.MAX_ITER", 2, resume=True))
    (output / "best.ckpt").write_bytes(files[output / "best.ckpt"])
    assert all(path.read_bytes() == content for path, content in files.items())

    caplog.clear()
    run(arguments("SOLVER.MAX_ITER", 2, resume=True))
    assert f"the training in {output} is finished: 2 iterations" in caplog.text
    assert files[output / "metrics.json"] in (output / "metrics.json").read_bytes()


def test_a_longer_schedule_has_its_own_rates(arguments, tmp_path, curve, caplog):
    run(arguments("SOLVER.MAX_ITER", 3))
    run(arguments("SOLVER.MAX_ITER", 6, resume=True))
    rates = curve(tmp_path / "output", "lr")
    assert [rates[i] for i in (3, 4, 5)] == pytest.approx([2e-3 / 3, 1e-3 / 3, 0])
    assert "SOLVER.MAX_ITER: 3 -> 6: counts from here on: the learning rate is" in caplog.text
    assert "learning rate at iteration 3: 0 by the run so far, 0.000666667 by" in caplog.text


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_everywhere_and_a_bar_on_a_terminal(terminal, arguments, monkeypatch, capfd):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    run(arguments("SOLVER.MAX_ITER", 1))
    out, err = capfd.readouterr()
    assert re.search(r"eta: 0:00:00  iter: 0  loss: .* loss_aux: .* data_time: .* lr: 1e-09", out)
    assert "v_num" not in out + err
    assert ("\r" in out + err) == terminal
