"""OUTPUT_DIR: what counts as another training, who holds it, and what it remembers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
from filelock import FileLock
from fvcore.common.config import CfgNode

from spatial_mamba_d2.training.run_folder import claimed, score_of_iteration, write_config


@pytest.mark.parametrize(
    "name", ["last.ckpt", "best.ckpt", "model_0000099.pth", "last_checkpoint", "metrics.json",
             "config.yaml"],
)  # fmt: skip
def test_a_folder_that_holds_a_training_is_refused(name, tmp_path):
    (tmp_path / name).write_text("content")
    with (
        pytest.raises(ValueError, match=rf"holds another training \({name}\): .* --resume, or "),
        claimed(tmp_path, resume=False),
    ):
        pass
    assert (tmp_path / name).read_text() == "content"
    with claimed(tmp_path, resume=True):
        pass


def test_what_an_evaluation_leaves_is_no_training(tmp_path):
    for name in ("scores_ss_whole.json", "log.txt"):
        (tmp_path / name).write_text("content")
    (tmp_path / "metrics.json").touch()  # of a training that ended before its first iteration
    with claimed(tmp_path, resume=False):
        pass


def test_one_training_at_a_time(tmp_path):
    folder = tmp_path / "new" / "folder"
    with claimed(folder, resume=False):
        message = rf"folder is used by another training \(process {os.getpid()} on "
        with pytest.raises(ValueError, match=message), claimed(folder, resume=True):
            pass
        with claimed(folder, resume=False, is_first_process=False):  # of the same training
            pass
    with claimed(folder, resume=False):  # free again
        pass


def test_the_lock_of_a_killed_training_is_free(tmp_path):
    """Its process is gone; another one of it may hold the lock a little longer."""
    program = (
        "import os, signal, sys; from spatial_mamba_d2.training.run_folder import claimed\n"
        "with claimed(sys.argv[1], resume=False): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    holder = json.loads((tmp_path / ".training.json").read_text())
    assert holder["host"] == platform.node() and holder["pid"] != os.getpid()
    with claimed(tmp_path, resume=False):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="OUTPUT_DIR .*file cannot be written: File exists"):
        with claimed(tmp_path / "file", resume=False):
            pass


def test_the_lock_is_the_operating_systems(tmp_path):
    """Whoever wrote the holder's name: what counts is the lock."""
    (tmp_path / ".training.json").write_text("{ damaged")
    with claimed(tmp_path, resume=False):
        lock = FileLock(tmp_path / ".training.lock")
        assert not lock.is_locked
        with pytest.raises(TimeoutError):
            lock.acquire(timeout=0)


def test_the_score_of_an_iteration_is_read(tmp_path):
    lines = [{"iteration": 3, "mIoU": 1.0}, {"iteration": 3, "mIoU": 2.0}, {"iteration": 5}]
    text = "\n".join([*map(json.dumps, lines), '{"iteration": 9, "mIoU'])
    (tmp_path / "metrics.json").write_text(text)
    assert score_of_iteration(tmp_path, 4, "mIoU") == 2.0  # the last of a repeated one
    assert score_of_iteration(tmp_path, 6, "mIoU") is None
    assert score_of_iteration(tmp_path / "absent", 6, "mIoU") is None


def test_config_is_written(tmp_path):
    write_config(CfgNode({"SEED": 3}), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "SEED: 3\n"
