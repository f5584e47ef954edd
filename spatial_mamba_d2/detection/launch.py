"""Start training in one or several processes, on GPUs (NCCL) or CPUs (gloo)."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.system.cli import parse_address
from spatial_mamba_d2.system.launching import (
    JOIN_TIMEOUT_S,
    check_launch,
    slurm_tasks,
    under_torchrun,
    unreachable,
    wait_for_machine_0,
)

# After one process has failed, the others have so long to end by themselves.
_GRACE_S = 5.0


def launch(
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
) -> Any:
    """Run ``main(*args)`` in several processes on this machine; under ``torchrun``, in this one.

    If one process fails, all end, and its error is raised here. Signals are passed on; if the
    processes end by one, so does this one.

    Args:
        main: a function that can be pickled.
        num_processes: per machine; one per GPU, or on CPUs if there is no GPU.
        num_machines: with more than one, every machine runs the same command with its own
            ``machine_rank`` and the same ``dist_url``.
        dist_url: ``tcp://HOST:PORT`` of machine 0; ``auto`` picks a free port on a single machine.

    Returns:
        the result of ``main`` if it runs in this process, else ``None``.

    Raises:
        ValueError: numbers that do not fit together or to ``torchrun`` and ``srun``, more processes
            than GPUs, or no address of machine 0 for several machines.
        ConnectionError: the processes did not find each other.
    """
    check_launch(
        argparse.Namespace(
            num_gpus=num_processes,
            num_machines=num_machines,
            machine_rank=machine_rank,
            dist_url=dist_url,
        )
    )
    if under_torchrun():
        _join(None, -1, -1, int(os.environ["LOCAL_WORLD_SIZE"]))
        return _run(main, args)
    if slurm_tasks() > num_machines:
        raise ValueError(
            f"srun started {slurm_tasks()} tasks for {num_machines} machines, but detection starts "
            "its processes itself: use srun --ntasks-per-node 1 with --num-gpus"
        )
    gpus = torch.cuda.device_count()
    if gpus and num_processes > gpus:  # each process joins with a GPU, whatever MODEL.DEVICE is
        raise ValueError(f"--num-gpus must be at most {gpus}, the GPUs here, got {num_processes}")
    world_size = num_machines * num_processes
    if world_size == 1:
        return main(*args)
    if num_machines == 1 and dist_url == "auto":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            dist_url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    if machine_rank:
        wait_for_machine_0(dist_url)
    with stopping.noticed():
        context = mp.start_processes(
            _worker,
            args=(main, num_processes, world_size, machine_rank, dist_url, args),
            nprocs=num_processes,
            start_method="spawn",
            join=False,
        )
        _wait(context)
    return None


def _wait(context: Any) -> None:
    """Until all processes have ended; exits with the code of the first that failed."""
    passed_on = False
    try:
        while not context.join(timeout=0.5, grace_period=_GRACE_S):
            if (signum := stopping.requested()) and not passed_on:
                passed_on = True
                for process in context.processes:
                    if process.is_alive():
                        os.kill(process.pid, signum)
    except ProcessExitedException as error:
        if error.exit_code > 0:  # it has told why itself, or was stopped
            sys.exit(error.exit_code)
        raise


def _worker(
    local_rank: int,
    main: Callable[..., Any],
    num_processes: int,
    world_size: int,
    machine_rank: int,
    dist_url: str,
    args: tuple[Any, ...],
) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    os.environ["LOCAL_RANK"] = str(local_rank)
    _join(dist_url, machine_rank * num_processes + local_rank, world_size, num_processes)
    _run(main, args)


def _join(
    url: str | None,
    rank: int,
    world_size: int,
    local_world_size: int,
    timeout_s: float = JOIN_TIMEOUT_S,
) -> None:
    """Join the process group; ``url`` is None under ``torchrun``.

    Raises:
        ConnectionError: not all processes came in time, or the address is not usable.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if url is None:
        dist.init_process_group(backend, init_method="env://")
    else:
        host, port = parse_address(url)
        try:
            # The store has a timeout of its own: later ones are about evaluations, which take long.
            store = dist.TCPStore(
                host, port, world_size, is_master=rank == 0, timeout=timedelta(seconds=timeout_s)
            )
        except (dist.DistError, OSError) as error:
            raise ConnectionError(unreachable(url, timeout_s, error)) from None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    comm.create_local_process_group(local_world_size)
    comm.synchronize()


def _run(main: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return main(*args)
    finally:
        dist.destroy_process_group()
