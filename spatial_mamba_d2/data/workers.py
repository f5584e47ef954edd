"""What a process that loads data for a training must see to."""

from __future__ import annotations

import ctypes
import signal
import sys


def die_with_parent(worker: int) -> None:
    """Else a worker whose training was killed can wait for ever to hand over its last batch."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
