"""Runs that are killed: no half checkpoint at any moment, and training that continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.system.cli import build_training_parser

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork are POSIX")

# The writer is imported once; each of its children writes checkpoints until it is killed, at a
# moment that is drawn. What the child has reported as written must be on disk.
PROGRAM = """
import os, random, signal, sys, time
from pathlib import Path

import torch

from spatial_mamba_d2.models import read_checkpoint

torch.set_num_threads(1)
writer, root, moments = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])


def lightning_writer(folder):
    from spatial_mamba_d2.training.checkpoint import SafeCheckpointIO

    io = SafeCheckpointIO()
    return lambda step: io.save_checkpoint(content(step), folder / "last.ckpt")


def detectron2_writer(folder):
    from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer

    saver = SafeCheckpointer(torch.nn.Linear(2, 2), str(folder))
    return lambda step: saver.save(f"model_{step % 3}", **content(step))


def content(step):
    return {"values": torch.full((400_000,), step), "step": step}


def read_last(folder):
    mark = folder / "last_checkpoint"
    return read_checkpoint(folder / (mark.read_text() if mark.exists() else "last.ckpt"))


make = {"lightning": lightning_writer, "detectron2": detectron2_writer}[writer]
make(root)  # imports what it needs, before the children fork
random = random.Random(0)
for moment in range(moments):
    folder = root / str(moment)
    folder.mkdir()
    reader, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        save = make(folder)
        step = 0
        while True:
            step += 1
            save(step)
            os.write(writing, b"%d\\n" % step)
    os.close(writing)
    reports = os.fdopen(reader)
    first = reports.readline()
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reported = [first, *reports][-1]
    last = read_last(folder)
    assert (last["values"] == last["step"]).all(), "half a checkpoint"
    assert last["step"] >= int(reported), f"{reported} was reported, {last['step']} is there"
print(moments, "moments")
"""


@pytest.mark.parametrize("writer", ["lightning", "detectron2"])
def test_no_kill_leaves_half_a_checkpoint(writer, tmp_path):
    """24 moments, drawn from a seed."""
    pytest.importorskip(writer, reason=f"{writer} is not installed")
    command = [sys.executable, "-c", PROGRAM, writer, str(tmp_path), "24"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "24 moments"


@pytest.mark.slow
def test_a_killed_training_continues(root, sample_images, test_variant, fork, tmp_path, caplog):
    """From its last checkpoint, to the end that it is given."""
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from spatial_mamba_d2.classification.train import run

    words = {
        "DATASETS.ROOT": sample_images, "OUTPUT_DIR": tmp_path, "MODEL.DEVICE": "cpu",
        "MODEL.SPATIAL_MAMBA.VARIANT": test_variant,
        "DATALOADER.NUM_WORKERS": 2, "INPUT.CROP_PX": 36, "TEST.SHORT_PX": 40,
        "SOLVER.IMS_PER_BATCH": 8, "SOLVER.WARMUP_EPOCHS": 0, "TEST.EVAL_EPOCHS": 0,
    }  # fmt: skip
    pairs = [str(word) for pair in words.items() for word in pair]
    pairs = ["--config-file", str(root / "configs/demo_spatial_mamba_t.yaml"), *pairs]
    parse = build_training_parser(None).parse_args
    process = fork(run, parse([*pairs, "SOLVER.EPOCHS", "1000"]))
    last = tmp_path / "last.ckpt"
    while not last.exists():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "the training ended by itself"
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    step = read_checkpoint(last)["global_step"]
    assert step >= 3
    epochs = step // 3 + 1
    with caplog.at_level("INFO", "spatial_mamba_d2"):
        run(parse(["--resume", *pairs, "SOLVER.EPOCHS", str(epochs)]))
    assert f"resuming from {last}" in caplog.text
    assert read_checkpoint(last)["global_step"] == 3 * epochs
