"""Whoever predicts the shards, processes, ranks or SLURM jobs: the same bytes."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.prediction import command, drivers
from spatial_mamba_d2.prediction.drivers import slurm_script

# tools/predict.py with a model that reads the truth.
PROGRAM = """
import importlib.util, sys
sys.path[:0] = [{tests!r}, {root!r}]
from conftest import Oracle
from spatial_mamba_d2.prediction import Predictor, command

command.load_named_predictor = lambda *arguments: Predictor(Oracle())
command.file_sha256 = str
spec = importlib.util.spec_from_file_location("predict_tool", {root!r} + "/tools/predict.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
if __name__ == "__main__":
    tool.run_tool(tool.main)
"""
# On a local Ray of two workers, which read the truth as well.
RAY = """
import ray

def read_the_truth():
    sys.path[:0] = [{tests!r}, {root!r}]
    from conftest import Oracle
    command.load_named_predictor = lambda *arguments: Predictor(Oracle())
    command.file_sha256 = str

if __name__ == "__main__":
    hook = {{"worker_process_setup_hook": read_the_truth}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=hook)
"""
# Two shards: the first one loses its worker once, the second one fails.
TASKS = """
import os, pathlib
from spatial_mamba_d2.prediction.drivers import run_ray

def predict_shard(shard):
    if shard == (1, 2) and not os.path.exists("died"):
        pathlib.Path("died").touch()
        os._exit(1)
    if shard == (2, 2):
        raise OSError(28, "No space left on device")
    name = "merged" if shard is None else "shard%d_of_%d" % shard
    pathlib.Path(name).write_text(os.getcwd())

run_ray(predict_shard, 2, None)
"""
SRUN = """#!/bin/bash
while [[ $1 == --ntasks=* ]]; do shift; done
exec "$@"
"""


@pytest.fixture
def predict(small_scene, root, tmp_path):
    """``predict(output, OPTION, ..., launcher=())``: the program on two images, by windows."""
    write_image(tmp_path / "photos/a.png", small_scene.image)
    write_image(tmp_path / "photos/b.png", small_scene.image[:300, :300])
    places = {"tests": str(Path(__file__).parent), "root": str(root)}
    program, ray_program = tmp_path / "program.py", tmp_path / "ray_program.py"
    program.write_text(PROGRAM.format(**places))
    before, main, after = PROGRAM.partition('if __name__ == "__main__":')
    ray_program.write_text((before + RAY + main + after).format(**places))

    def run(output, *options, launcher=(sys.executable,), environment=None):
        words = [
            "--weights", "none", "--input", "photos", "--output", output, "--window", 256,
            "--format", "coco,csv,gpkg",
        ]  # fmt: skip
        done = subprocess.run(
            [
                *launcher, ray_program if "--ray" in options else program,
                *map(str, [*options, *words]),
            ], cwd=tmp_path, text=True,
            capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "launcher"),
    [
        (("--processes", 2), (sys.executable,)),
        pytest.param((), TORCHRUN, marks=pytest.mark.long),
        (("--ray", 3), (sys.executable,)),
    ],
    ids=["processes", "torchrun", "ray"],
)
def test_the_same_bytes_whatever_the_driver(options, launcher, predict, tmp_path):
    if "--ray" in options:
        pytest.importorskip("ray", reason="Ray is not installed")
    predict("one")
    expected = content(tmp_path / "one")
    assert len(expected) == 5
    predict("several", *options, launcher=launcher)
    assert content(tmp_path / "several") == expected


@pytest.mark.long
def test_the_script_for_slurm(predict, tmp_path):
    predict("one")
    script = predict("jobs", "--slurm", 2)
    (tmp_path / "predict.sh").write_text(script)
    assert "#SBATCH --array=1-2\n" in script
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    for number in (2, 1):
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "SLURM_ARRAY_TASK_ID": str(number),
        }  # fmt: skip
        subprocess.run(["bash", tmp_path / "predict.sh"], env=environment, check=True)
    (merge,) = [line for line in script.splitlines() if "--wrap" in line]
    command = subprocess.run(
        ["bash", "-c", f"printf %s {merge.partition('--wrap ')[2]}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    subprocess.run(["bash", "-c", command], check=True)
    assert content(tmp_path / "jobs") == content(tmp_path / "one")


def test_a_script_with_unusual_words():
    script = slurm_script(["tools/predict.py", "--input", "my photos/*.jpg"], 7)
    assert "'my photos/*.jpg'" in script and "$SLURM_ARRAY_TASK_ID/7" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    with pytest.raises(ValueError, match=r"slurm \(--slurm\) must be at least 1"):
        slurm_script(["x"], 0)


@pytest.mark.long
def test_a_process_that_fails_is_named(predict, tmp_path):
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing/.parts").write_text("in the way")
    with pytest.raises(AssertionError, match=r"2 of 2 have failed, of shard 1, 2"):
        predict("failing", "--processes", 2)


@pytest.mark.slow
def test_tasks_of_ray(tmp_path):
    """A worker that dies is replaced; a task that fails is named, and the others are done."""
    pytest.importorskip("ray", reason="Ray is not installed")
    (tmp_path / "tasks.py").write_text(TASKS)
    done = subprocess.run(
        [sys.executable, "tasks.py"], cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode != 0
    assert (tmp_path / "died").exists() and not (tmp_path / "merged").exists()
    assert (tmp_path / "shard1_of_2").read_text() == str(tmp_path)
    assert "1 of 2 tasks have failed, of shard 2: " in done.stderr
    assert "No space left on device; --resume continues" in done.stderr


def test_ray_that_is_missing_or_asked_for_with_others(monkeypatch):
    with pytest.raises(ValueError, match=r"ray \(--ray\) must be at least 1, .* got 0"):
        drivers.run_ray(print, 0, None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"--ray needs Ray: pip install .*\[ray\]"):
        drivers.run_ray(print, 2, None)
    args = argparse.Namespace(
        processes=2, slurm=None, ray=2, shard=None, merge=False, input=["x"], resume=False
    )
    with pytest.raises(ValueError, match=r"ray \(--ray\) must be left out with --processes"):
        command.run(args)
