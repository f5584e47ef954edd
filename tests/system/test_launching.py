"""Options of training tools that do not fit together, or to torchrun and srun."""

from __future__ import annotations

import socket

import pytest

from spatial_mamba_d2.system.cli import build_training_parser
from spatial_mamba_d2.system.launching import check_launch, slurm_tasks, wait_for_machine_0

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
# a batch script of one task, as sbatch starts it, and the same under srun
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {**SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}


def check(*words, environment=()):
    check_launch(build_training_parser(None).parse_args([*words]), dict(environment))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-gpus", "0"], "--num-gpus must be at least 1, .*got 0; .*MODEL.DEVICE cpu"),
        (["--num-gpus", "-1"], "--num-gpus must be at least 1, .*got -1"),
        (["--num-machines", "0"], "--num-machines must be at least 1, got 0"),
        (["--machine-rank", "1"], r"--machine-rank must be in \[0, 0\] .*--num-machines 1, got 1"),
        (["--num-machines", "2", "--machine-rank", "5", "--dist-url", "tcp://a:1"],
         r"--machine-rank must be in \[0, 1\] for --num-machines 2, got 5"),
        (["--num-machines", "2", "--machine-rank", "-1", "--dist-url", "tcp://a:1"],
         r"--machine-rank must be in .*got -1"),
        (["--num-machines", "2"], "--dist-url must be tcp://HOST:PORT .*got 'auto'"),
        (["--num-machines", "2", "--dist-url", "a:1"], "--dist-url must be tcp://HOST:PORT"),
        (["--dist-url", "file:///tmp/x"], "--dist-url must be auto or tcp://HOST:PORT"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(words, message):
    with pytest.raises(ValueError, match=message):
        check(*words)


def test_torchrun_starts_the_processes():
    check(environment=TORCHRUN.items())
    check("--num-gpus", "2", "--num-machines", "2", environment=TORCHRUN.items())
    with pytest.raises(ValueError, match="--num-gpus must be left out under torchrun.*got 8"):
        check("--num-gpus", "8", environment=TORCHRUN.items())
    with pytest.raises(ValueError, match="--num-machines must be left out under torchrun.*got 3"):
        check("--num-machines", "3", environment=TORCHRUN.items())


def test_a_job_of_slurm_without_srun_starts_its_own():
    assert slurm_tasks(SBATCH) == 1 and slurm_tasks(SRUN) == 4
    check("--num-gpus", "2", environment=SBATCH.items())
    check("--num-gpus", "4", environment=SRUN.items())
    with pytest.raises(
        ValueError, match="srun started 4 tasks, but --num-gpus 2 .*ntasks-per-node"
    ):
        check("--num-gpus", "2", environment=SRUN.items())


def test_machine_0_is_waited_for():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"--dist-url {url}: .* did not find each other"):
            wait_for_machine_0(url, timeout_s=0.1)
        server.listen()
        wait_for_machine_0(url, timeout_s=5)
    with pytest.raises(ConnectionError, match="no-such-host.invalid:1: no host of that name"):
        wait_for_machine_0("tcp://no-such-host.invalid:1")
