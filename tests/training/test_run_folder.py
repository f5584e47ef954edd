"""OUTPUT_DIR: what counts as another training, who holds it, and what it remembers."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from functools import partial

import pytest
from filelock import FileLock
from fvcore.common.config import CfgNode

from spatial_mamba_d2.training.run_folder import claimed, score_of_iteration, write_config

claiming = partial(claimed, resume=False, last="last.ckpt")


@pytest.mark.parametrize(
    "name", ["last.ckpt", "best.ckpt", "model_0000099.pth", "last_checkpoint", "metrics.json",
             "config.yaml"],
)  # fmt: skip
def test_a_folder_that_holds_a_training_is_refused(name, tmp_path):
    (tmp_path / name).write_text("content")
    with (
        pytest.raises(ValueError, match=rf"holds another training \({name}\): .* --resume, or "),
        claiming(tmp_path),
    ):
        pass
    assert (tmp_path / name).read_text() == "content"


def test_resuming_needs_the_last_checkpoint_of_another_training(tmp_path):
    for name in ("config.yaml", "metrics.json"):  # of one killed before its first checkpoint
        (tmp_path / name).write_text("content")
    with claiming(tmp_path, resume=True):
        pass
    for last, other in [("last.ckpt", "best.ckpt"), ("last_checkpoint", "model_best.pth"),
                        ("last_checkpoint", "model_0000099.pth")]:  # fmt: skip
        (tmp_path / other).write_text("content")
        message = rf"--resume: .* holds another training \({other}\), but no {last} to continue"
        with pytest.raises(ValueError, match=message), claimed(tmp_path, resume=True, last=last):
            pass
        (tmp_path / last).write_text("content")
        with claimed(tmp_path, resume=True, last=last):
            pass
        (tmp_path / other).unlink()
        (tmp_path / last).unlink()


def test_weights_to_start_from_are_no_training(tmp_path):
    for name in ("spatial_mamba_tiny.pth", "model_zoo.pth", "upernet.ckpt"):
        (tmp_path / name).write_text("content")
    for resume in (False, True):
        with claiming(tmp_path, resume=resume):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="flock is of POSIX")
@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks(name, tmp_path, monkeypatch, caplog):
    import fcntl

    def failing(descriptor, operation):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", failing)
    with claiming(tmp_path):
        assert json.loads((tmp_path / ".training.json").read_text())["pid"] == os.getpid()
    assert "its file system has no locks; start no second training in it" in caplog.text
    for pid, is_alive in [(os.getppid(), True), (2**22 + 1, False)]:
        holder = {"pid": pid, "host": platform.node()}
        (tmp_path / ".training.json").write_text(json.dumps(holder))
        if is_alive:
            with pytest.raises(ValueError, match=rf"used by another .*process {pid} on"):
                with claiming(tmp_path):
                    pass
        else:
            with claiming(tmp_path):
                pass


def test_what_an_evaluation_leaves_is_no_training(tmp_path):
    for name in ("scores_ss_whole.json", "log.txt"):
        (tmp_path / name).write_text("content")
    (tmp_path / "metrics.json").touch()  # of a training that ended before its first iteration
    with claiming(tmp_path):
        pass


def test_one_training_at_a_time(tmp_path):
    folder = tmp_path / "new" / "folder"
    with claiming(folder):
        message = rf"folder is used by another training \(process {os.getpid()} on "
        with pytest.raises(ValueError, match=message), claiming(folder, resume=True):
            pass
        with claiming(folder, is_first_process=False):  # of the same training
            pass
    with claiming(folder):  # free again
        pass


def test_the_lock_of_a_killed_training_is_free(tmp_path):
    """Its process is gone; another one of it may hold the lock a little longer."""
    program = (
        "import os, signal, sys; from spatial_mamba_d2.training.run_folder import claimed\n"
        "with claimed(sys.argv[1], resume=False, last='last.ckpt'):"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    holder = json.loads((tmp_path / ".training.json").read_text())
    assert holder["host"] == platform.node() and holder["pid"] != os.getpid()
    with claiming(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="OUTPUT_DIR .*file cannot be written: File exists"):
        with claiming(tmp_path / "file"):
            pass


def test_the_lock_is_the_operating_systems(tmp_path):
    """Whoever wrote the holder's name: what counts is the lock."""
    (tmp_path / ".training.json").write_text("{ damaged")
    with claiming(tmp_path):
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
