"""How a training ends early and goes on: signals, numbers that are not finite, the best weights."""

from __future__ import annotations

import json
import math
import os
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from spatial_mamba_d2.detection.hooks import Evaluation
from spatial_mamba_d2.detection.launch import _join, launch
from spatial_mamba_d2.detection.step import AccumulatingTrainer
from spatial_mamba_d2.detection.train import run
from spatial_mamba_d2.detection.trainer import Trainer
from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.system.stopping import Stopped


@pytest.fixture
def run_arguments(root, arguments):
    config = root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml"
    return partial(arguments, config_file=str(config))


@contextmanager
def stopped(owner, name, signum, when=lambda *args: True):
    """The signal comes at the beginning of that method, and ends the run with its exit code."""
    method = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if when(*args):
            signal.raise_signal(signum)
        return method(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as ended:
        is_of_the_class = isinstance(vars(owner)[name], classmethod)
        patch.setattr(owner, name, staticmethod(wrapped) if is_of_the_class else wrapped)
        yield
    assert ended.value.code == 128 + signum


def curve(folder, key):
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line[key] for line in lines if key in line}


def test_signals_save_and_resuming_is_exact(run_arguments, tmp_path):
    """In an iteration, then in an evaluation, which the resumed training makes up for."""
    more = ("SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 100)
    whole = run(run_arguments(*more, "OUTPUT_DIR", tmp_path / "whole"))
    output = tmp_path / "output"
    with stopped(AccumulatingTrainer, "run_step", signal.SIGTERM, lambda self: self.iter == 0):
        run(run_arguments(*more, resume=True))
    assert f"--resume: {output} has no checkpoint; a new" in (output / "log.txt").read_text()
    assert (output / "last_checkpoint").read_text() == "model_0000000.pth"
    with stopped(Trainer, "test", signal.SIGINT):
        run(run_arguments(*more, resume=True))
    assert (output / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not curve(output, "bbox/AP")
    resumed = run(run_arguments(*more, resume=True))

    for key in ("total_loss", "lr", "segm/AP"):
        expected = curve(tmp_path / "whole", key)
        assert curve(output, key) == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert resumed["segm"] == pytest.approx(whole["segm"], rel=1e-6, nan_ok=True)
    scores = [score for score in curve(output, "segm/AP").values() if score == score]
    if scores:
        assert read_checkpoint(output / "model_best.pth")["best_score"] == pytest.approx(
            max(scores)
        )


def test_the_best_weights_survive_resuming(make_cfg):
    """Their score is in the file; a checkpoint to resume from stays the last one."""
    cfg = make_cfg()
    trainer = Trainer(cfg)  # its checkpointer has a weak reference to it
    checkpointer = trainer.checkpointer
    assert checkpointer.read_best_score() == -math.inf
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.save_best(12.5, 1)
    again = Trainer(cfg)
    assert again.checkpointer.read_best_score() == 12.5
    assert again.checkpointer.get_checkpoint_file().endswith("model_0000001.pth")
    content = read_checkpoint(f"{cfg.OUTPUT_DIR}/model_best.pth")
    assert content["classes"] and content["iteration"] == 1


def test_the_first_of_several_test_sets_decides(make_cfg, tmp_path, caplog):
    """Also by the score in the metrics, when the evaluation is not repeated."""
    cfg = make_cfg()
    cfg.defrost()
    cfg.DATASETS.TEST = ("b", "a")
    trainer = SimpleNamespace(
        last_results=None, max_iter=4, start_iter=2, iter=1, storage=Mock(iter=1),
        checkpointer=Mock(**{"read_best_score.return_value": 5.0}),
    )  # fmt: skip
    results = {name: {task: {"AP": ap} for task, ap in scores.items()} for name, scores in
               {"a": {"bbox": 90, "segm": 80}, "b": {"bbox": 30, "segm": 20}}.items()}  # fmt: skip

    def evaluate():
        trainer.last_results = results
        return results

    hook = Evaluation(cfg, evaluate)
    hook.trainer = trainer
    with caplog.at_level("INFO"):
        hook._do_eval()
    trainer.checkpointer.save_best.assert_called_once_with(20.0, 1)
    assert "the best b/segm/AP so far, 20.000" in caplog.text
    Path(cfg.OUTPUT_DIR).mkdir()
    scores = {"iteration": 1, "a/segm/AP": 80, "b/bbox/AP": 30, "b/segm/AP": 25}
    Path(cfg.OUTPUT_DIR, "metrics.json").write_text(json.dumps(scores))
    assert hook._is_recorded(2)
    trainer.checkpointer.save_best.assert_called_with(25.0, 1)


def test_what_is_not_finite_ends_the_training(run_arguments, tmp_path, monkeypatch):
    """In the last iteration, so that an evaluation would follow."""

    def never(*args, **kwargs):
        raise AssertionError("evaluated")

    monkeypatch.setattr(Trainer, "test", never)
    more = ("SOLVER.BASE_LR", "1e30", "SOLVER.CLIP_GRADIENTS.ENABLED", False,
            "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 2,
            "SOLVER.CHECKPOINT_PERIOD", 1)  # fmt: skip
    message = "diverged at iteration 1: Predicted boxes or scores contain Inf/NaN.*0000000.pth"
    with pytest.raises(FloatingPointError, match=message):
        run(run_arguments(*more))
    output = tmp_path / "output"
    assert [path.name for path in output.glob("*.pth")] == ["model_0000000.pth"]
    assert "Traceback" not in (output / "log.txt").read_text()
    assert "ended by FloatingPointError: training diverged" in (output / "log.txt").read_text()


def test_weights_that_are_not_finite_are_neither_saved_nor_scored(make_cfg):
    cfg = make_cfg()
    trainer = Trainer(cfg)
    with torch.no_grad():
        next(trainer.model.parameters())[0] = math.nan
    with pytest.raises(FloatingPointError, match="weights for model_final: 1 tensors .*backbone"):
        trainer.checkpointer.save("model_final")
    with pytest.raises(FloatingPointError, match="weights to evaluate: 1 tensors"):
        Trainer.test(cfg, trainer.model)
    assert trainer.last_checkpoint is None


def test_resuming_with_other_settings(run_arguments, tmp_path, caplog):
    """What cannot be is refused before anything is rewritten; another rate counts."""
    output = tmp_path / "output"
    short = ("SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 1e-3)
    run(run_arguments(*short))
    files = {path: path.read_bytes() for path in output.glob("*.*") if path.name != "log.txt"}
    with pytest.raises(ValueError, match=r"holds another training .*model_final.pth.*--resume"):
        run(run_arguments(*short))
    with pytest.raises(ValueError, match="another network: .*MODEL.FPN.OUT_CHANNELS was 96, is 32"):
        run(run_arguments(*short, "MODEL.FPN.OUT_CHANNELS", 32, resume=True))
    with pytest.raises(ValueError, match="MAX_ITER must be at least the 2 iterations .*got 1"):
        run(run_arguments("SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0, resume=True))
    best = output / "model_best.pth"
    kept = best.read_bytes() if best.exists() else None
    torch.save({"model": {}}, best)
    with pytest.raises(ValueError, match="model_best.pth is no checkpoint .*: best_score must be"):
        run(run_arguments(*short, resume=True))
    best.unlink()
    if kept:
        best.write_bytes(kept)
    last = output / "model_final.pth"
    weights = {"model": read_checkpoint(last)["model"]}
    torch.save(weights, last)
    with pytest.raises(ValueError, match="model_final.pth is no checkpoint .*: trainer, iteration"):
        run(run_arguments(*short, resume=True))
    last.write_bytes(files[last])
    assert all(path.read_bytes() == content for path, content in files.items())

    caplog.clear()
    lower = ("SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 1e-6)
    run(run_arguments(*lower, resume=True))
    rates = curve(output, "lr")
    assert rates[0] == pytest.approx(1e-3)
    assert [rates[2], rates[3]] == pytest.approx([0.5e-6, 1e-6 * (1 - math.cos(math.pi / 4)) / 2])
    log = (output / "log.txt").read_text()
    assert "SOLVER.BASE_LR: 0.001 -> 1e-06: counts from here on: the learning rate is" in log
    assert "learning rate at iteration 2: " in log


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_with_its_code():
    with pytest.raises(SystemExit) as ended:
        launch(os._exit, 2, args=(143,))
    assert ended.value.code == 143


def test_machines_that_do_not_come_are_named(monkeypatch):
    with pytest.raises(ConnectionError, match="--dist-url tcp://127.0.0.1:.* within 1 s"):
        _join("tcp://127.0.0.1:29779", 0, 2, 1, timeout_s=1)
