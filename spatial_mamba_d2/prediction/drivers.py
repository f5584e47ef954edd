"""Who predicts the shards of a run: processes of this machine, ranks of torchrun, SLURM jobs.

All of them leave the same parts (:mod:`.parts`), from which the same files are written.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeAlias

import torch

from spatial_mamba_d2.system.cli import run_tool
from spatial_mamba_d2.system.workers import die_with_parent

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
