"""What processes that load data for a training need."""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any

import cv2
import torch

from spatial_mamba_d2.system.stopping import outlast_signals


def worker_options(num_workers: int) -> dict[str, Any]:
    """Arguments of a ``DataLoader`` with that many worker processes."""
    if num_workers:
        single_thread_opencv()
    return {
        "num_workers": num_workers,
        "worker_init_fn": start_worker,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": num_workers > 0,
    }


def single_thread_opencv() -> None:
    """Call before forking: OpenCV's thread pool does not survive it, and workers would deadlock."""
    cv2.setNumThreads(0)


def start_worker(worker: int) -> None:
    """What a process that loads data does first."""
    die_with_parent(worker)
    outlast_signals()


def die_with_parent(worker: int) -> None:
    """Without this, a worker whose training was killed can block forever on its last batch."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
