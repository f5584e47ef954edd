"""What processes that load data for a training need."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from functools import cache
from multiprocessing.util import Finalize
from typing import Any

import cv2
import torch

from spatial_mamba_d2.system.stopping import outlast_signals


def worker_options(num_workers: int) -> dict[str, Any]:
    """Arguments of a ``DataLoader`` with that many worker processes."""
    if num_workers:
        single_thread_opencv()
        kill_workers_at_exit()
    return {
        "num_workers": num_workers,
        "worker_init_fn": start_worker,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": num_workers > 0,
    }


def single_thread_opencv() -> None:
    """Call before forking: OpenCV's thread pool does not survive it, and workers would deadlock."""
    cv2.setNumThreads(0)


@cache
def kill_workers_at_exit() -> None:
    """Python ends them by SIGTERM and waits for them, which they outlast for a while."""
    Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def start_worker(worker: int) -> None:
    """What a process that loads data does first."""
    die_with_parent(worker)
    outlast_signals()


def die_with_parent(worker: int) -> None:
    """Without this, a worker whose training was killed can block forever on its last batch."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
