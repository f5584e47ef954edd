"""Start training in one or several processes, on GPUs (NCCL) or CPUs (gloo)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from spatial_mamba_d2.system.cli import parse_address


def launch(
    main: Callable[..., Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
) -> Any:
    """Run ``main(*args)`` in several processes on this machine; under ``torchrun``, in this one.

    Args:
        main: a function that can be pickled.
        num_processes: per machine; one per GPU, or on CPUs if there is no GPU.
        num_machines: with more than one, every machine runs the same command with its own
            ``machine_rank`` and the same ``dist_url``.
        dist_url: ``tcp://HOST:PORT`` of machine 0; ``auto`` picks a free port on a single machine.

    Returns:
        the result of ``main`` if it runs in this process, else ``None``.

    Raises:
        ValueError: more processes than GPUs, or no address of machine 0 for several machines.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join("env://", -1, -1, int(os.environ["LOCAL_WORLD_SIZE"]))
        return _run(main, args)
    gpus = torch.cuda.device_count()
    if gpus and num_processes > gpus:  # each process joins with a GPU, whatever MODEL.DEVICE is
        raise ValueError(f"--num-gpus must be at most {gpus}, the GPUs here, got {num_processes}")
    world_size = num_machines * num_processes
    if world_size == 1:
        return main(*args)
    if num_machines > 1:
        parse_address(dist_url)
    elif dist_url == "auto":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            dist_url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    mp.start_processes(
        _worker,
        args=(main, num_processes, world_size, machine_rank, dist_url, args),
        nprocs=num_processes,
        start_method="spawn",
    )
    return None


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


def _join(url: str, rank: int, world_size: int, local_world_size: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=world_size)
    comm.create_local_process_group(local_world_size)
    comm.synchronize()


def _run(main: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return main(*args)
    finally:
        dist.destroy_process_group()
