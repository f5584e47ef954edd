"""What processes that load data for a training must see to."""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any

import cv2
import torch


def worker_options(workers: int) -> dict[str, Any]:
    """Arguments of a ``DataLoader`` with that many worker processes."""
    if workers:
        single_thread_opencv()
    return {
        "num_workers": workers,
        "worker_init_fn": die_with_parent,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": workers > 0,
    }


def single_thread_opencv() -> None:
    """To be called before forking: a worker inherits OpenCV's threads dead, and waits for them."""
    cv2.setNumThreads(0)


def die_with_parent(worker: int) -> None:
    """Else a worker whose training was killed can wait for ever to hand over its last batch."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
