"""Whoever predicts the shards, processes, ranks or SLURM jobs: the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.prediction.drivers import slurm_script

# tools/predict.py with a model that reads the truth.
PROGRAM = """
import importlib.util, sys
sys.path[:0] = [{tests!r}, {root!r}]
from conftest import Oracle
from spatial_mamba_d2.prediction import Predictor, command

command.load_predictor = lambda *arguments: Predictor(Oracle())
command.file_sha256 = str
spec = importlib.util.spec_from_file_location("predict_tool", {root!r} + "/tools/predict.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
if __name__ == "__main__":
    tool.run_tool(tool.main)
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
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent), root=str(root)))

    def run(output, *options, launcher=(sys.executable,), environment=None):
        words = [
            "--weights", "none", "--input", "photos", "--output", output, "--window", 256,
            "--format", "coco,csv,gpkg",
        ]  # fmt: skip
        done = subprocess.run(
            [*launcher, program, *map(str, [*options, *words])], cwd=tmp_path, text=True,
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
    ],
    ids=["processes", "torchrun"],
)
def test_the_same_bytes_whatever_the_driver(options, launcher, predict, tmp_path):
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
