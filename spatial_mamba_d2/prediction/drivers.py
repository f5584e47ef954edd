"""Who predicts the shards of a run: processes of this machine, ranks of torchrun, SLURM jobs, Ray.

All of them leave the same parts (:mod:`.parts`), from which the same files are written.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import torch

from spatial_mamba_d2.system.cli import run_tool
from spatial_mamba_d2.system.tool_errors import find_mistake
from spatial_mamba_d2.system.workers import die_with_parent

logger = logging.getLogger(__name__)
# Predicts a shard (i, n), or with None merges what all have predicted; must be picklable.
PredictShard: TypeAlias = Callable[[tuple[int, int] | None], None]
_LONGEST = timedelta(days=365)  # that ranks wait for each other

_SLURM = """#!/bin/bash
#SBATCH --job-name=predict
#SBATCH --array=1-{count}
#SBATCH --requeue
# Add the time, memory and partition that one shard needs. Submit it, and what follows it:
#   job=$(sbatch --parsable predict.sh)
#   sbatch --dependency=afterok:$job --wrap {merge}
cd {folder} || exit
srun --ntasks=1 {command} --shard "$SLURM_ARRAY_TASK_ID/{count}"{rest}
"""


def run_processes(predict_shard: PredictShard, count: int) -> None:
    """Predict ``count`` shards in as many processes, which share the processors, and merge them.

    Raises:
        ValueError: a process has failed; what it has to say is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    num_threads = max(1, torch.get_num_threads() // count)
    processes = [
        context.Process(target=_run_process, args=(predict_shard, (number, count), num_threads))
        for number in range(1, count + 1)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
    if failed := [i for i, process in enumerate(processes, 1) if process.exitcode]:
        raise ValueError(
            f"processes (--processes): {len(failed)} of {count} have failed, of shard "
            f"{', '.join(map(str, failed))}; --resume continues"
        )
    predict_shard(None)


def _run_process(predict_shard: PredictShard, shard: tuple[int, int], num_threads: int) -> None:
    die_with_parent(shard[0])
    torch.set_num_threads(num_threads)
    run_tool(partial(predict_shard, shard))


def device_of_rank() -> str:
    """The GPU of a rank of ``torchrun``, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def run_rank(predict_shard: PredictShard) -> None:
    """Predict the shard of this rank of ``torchrun``; the first one merges all of them."""
    from torch import distributed

    distributed.init_process_group("gloo", timeout=_LONGEST)
    try:
        rank, count = distributed.get_rank(), distributed.get_world_size()
        predict_shard((rank + 1, count))
        distributed.barrier()
        if rank == 0:
            predict_shard(None)
    finally:
        distributed.destroy_process_group()


def run_ray(predict_shard: PredictShard, count: int, device: str | None) -> None:
    """Predict ``count`` shards as tasks of Ray, and merge them in this process.

    The tasks run on the cluster that ``RAY_ADDRESS`` names or this machine belongs to, or else on a
    local Ray that ends with them. Ray repeats a task whose worker has died.

    Args:
        device: of the model; each task has a GPU if it is one, or if it is None and there are some.

    Raises:
        ValueError: the count is below 1, or a task has failed.
        ImportError: Ray is not installed.
    """
    if count < 1:
        raise ValueError(f"ray (--ray) must be at least 1, the number of tasks, got {count}")
    ray = _import_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports over the network
        ray.init()
    try:
        failed = _run_tasks(ray, predict_shard, count, device)
    finally:
        if is_ours:
            ray.shutdown()
    if failed:
        raise ValueError(
            f"ray (--ray): {len(failed)} of {count} tasks have failed, of shard "
            f"{', '.join(map(str, failed))}: {next(iter(failed.values()))}; --resume continues"
        )
    predict_shard(None)


def _run_tasks(
    ray: Any, predict_shard: PredictShard, count: int, device: str | None
) -> dict[int, str]:
    """The shards that have failed, and why."""
    has_gpu = "GPU" in ray.cluster_resources() if device is None else device.startswith("cuda")
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    # A task is on one node, of which those for the work may be smaller than others.
    num_cpus = max(1, min(sum(cpus) // count, *(number for number in cpus if number), 1 << 30))
    task = ray.remote(_run_task).options(num_cpus=num_cpus, num_gpus=int(has_gpu))
    shards = {
        task.remote(predict_shard, (number, count), num_cpus, os.getcwd()): number
        for number in range(1, count + 1)
    }
    failed: dict[int, str] = {}
    waiting = list(shards)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            mistake = find_mistake(getattr(error, "cause", None) or error)
            failed[shards[done]] = mistake.text if mistake else str(error)
        logger.info("%d of %d shards have ended", count - len(waiting), count)
    return dict(sorted(failed.items()))


def _run_task(
    predict_shard: PredictShard, shard: tuple[int, int], num_threads: int, folder: str
) -> None:
    """A shard on a worker of Ray, which has the files of this machine at the same places."""
    os.chdir(folder)
    torch.set_num_threads(num_threads)
    predict_shard(shard)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'spatial-mamba-d2[ray]'") from error
    return ray


def slurm_script(arguments: Sequence[str], count: int) -> str:
    """A SLURM array job of ``count`` shards.

    Args:
        arguments: the command line, without what asks for this script.

    Raises:
        ValueError: the count is below 1.
    """
    if count < 1:
        raise ValueError(f"slurm (--slurm) must be at least 1, the number of jobs, got {count}")
    # Options go in front of KEY VALUE.
    tool, *words = arguments
    command = shlex.join([sys.executable, os.path.abspath(tool)])
    rest = f" {shlex.join(words)}"
    merge = shlex.quote(f"cd {shlex.quote(os.getcwd())} && {command} --merge{rest}")
    return _SLURM.format(
        count=count, folder=shlex.quote(os.getcwd()), command=command, rest=rest, merge=merge
    )
