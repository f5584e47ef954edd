"""How the processes of a training are started: the options, ``torchrun`` and SLURM, checked."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Mapping

from spatial_mamba_d2.system.cli import parse_address

#: how long the processes of a training wait for each other at its start, in seconds
JOIN_TIMEOUT_S = 600


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_launch(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> None:
    """The options of :func:`~spatial_mamba_d2.system.cli.build_training_parser` fit together.

    Raises:
        ValueError: they do not, or they contradict ``torchrun`` or ``srun``.
    """
    if args.num_gpus < 1:
        raise ValueError(
            f"--num-gpus must be at least 1, the number of processes per machine, got "
            f"{args.num_gpus}; to train on the CPU, add MODEL.DEVICE cpu"
        )
    if args.num_machines < 1:
        raise ValueError(f"--num-machines must be at least 1, got {args.num_machines}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank must be in [0, {args.num_machines - 1}] for --num-machines "
            f"{args.num_machines}, got {args.machine_rank}"
        )
    if "TORCHELASTIC_RUN_ID" in environment:
        _check_torchrun(args, environment)
        return
    if args.num_machines > 1:
        parse_address(args.dist_url)
    elif args.dist_url != "auto" and not args.dist_url.startswith("tcp://"):
        raise ValueError(f"--dist-url must be auto or tcp://HOST:PORT, got {args.dist_url!r}")
    num_tasks = slurm_tasks(environment)
    num_processes = args.num_gpus * args.num_machines
    if num_tasks not in (1, args.num_machines, num_processes):
        raise ValueError(
            f"srun started {num_tasks} tasks, but --num-gpus {args.num_gpus} and --num-machines "
            f"{args.num_machines} ask for {num_processes} processes: start one task per machine "
            "(srun --ntasks-per-node 1), which starts the others itself, or set --num-gpus to the "
            "tasks per machine"
        )


def _check_torchrun(args: argparse.Namespace, environment: Mapping[str, str]) -> None:
    local = int(environment["LOCAL_WORLD_SIZE"])
    num_machines = int(environment["WORLD_SIZE"]) // local
    for option, ours, theirs in (
        ("--num-gpus", args.num_gpus, local),
        ("--num-machines", args.num_machines, num_machines),
    ):
        if ours not in (1, theirs):
            raise ValueError(
                f"{option} must be left out under torchrun, which starts the processes (here "
                f"{local} on each of {num_machines} machines), got {ours}"
            )


def slurm_tasks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes ``srun`` has started of this program; 1 if it did not start it.

    Variables that a job has outside of ``srun``, such as SLURM_NTASKS, say what it asked for.
    """
    if "SLURM_STEP_ID" not in environment and "SLURM_STEPID" not in environment:
        return 1
    return int(environment.get("SLURM_STEP_NUM_TASKS", 1))


def wait_for_machine_0(url: str, timeout_s: float = JOIN_TIMEOUT_S) -> None:
    """Return when something accepts connections at ``--dist-url``.

    Raises:
        ConnectionError: nothing did, or there is no such host.
    """
    address = parse_address(url)
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except socket.gaierror as error:
            raise ConnectionError(
                f"--dist-url {url}: no host of that name: {error.strerror}"
            ) from None
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(unreachable(url, timeout_s, error)) from None
        time.sleep(min(1.0, timeout_s / 10))


def unreachable(url: str, timeout_s: float, error: Exception) -> str:
    reason = str(error).strip().split("\n", 1)[0]
    return (
        f"--dist-url {url}: the processes did not find each other within {timeout_s:.0f} s; every "
        "machine must run the same command with its own --machine-rank, and reach that address of "
        f"machine 0 ({reason})"
    )
