"""Signals that end a training: the state is saved first, and the exit code says "not finished".

A scheduler sends SIGTERM (SLURM also SIGUSR1, if asked to) and kills after a grace period; a user
presses Ctrl-C. The first signal only leaves a note here, which the training reads at the end of
each iteration and between the images of an evaluation. A second one ends the process at once.
Predictions of a stream end in the same way.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
# A launcher passes on what the terminal or the scheduler has sent to its processes as well.
SAME_REQUEST_S = 2.0
# For so long a process that loads data continues after SIGTERM: the iteration may need its images.
WORKER_GRACE_S = 30


class Stopped(SystemExit):
    """A training ended because a signal asked for it; the exit code is 128 + its number."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


class _Request:
    """The signal that this process has received, if any; set by the handler."""

    def __init__(self, consequence: str) -> None:
        self.consequence = consequence
        self.signum = 0
        self.time = 0.0
        self.owner = os.getpid()

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:  # a forked process that loads data
            return
        now = time.monotonic()
        if not self.signum:
            self.signum, self.time = signum, now
            name = signal.Signals(signum).name
            text = f"{name}: {self.consequence}, then ending; once more to end at once\n"
            os.write(2, text.encode())
        elif now - self.time > SAME_REQUEST_S:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


_request: _Request | None = None


def requested() -> int:
    """The number of the signal that asked this process to stop, or 0."""
    return _request.signum if _request is not None else 0


def stop_if_requested() -> None:
    """Raises Stopped if a signal has asked for it: for where nothing has to be saved."""
    if signum := requested():
        raise Stopped(signum)


def install() -> None:
    """Set our handlers again, after a library has set its own; only within ``noticed``."""
    if _request is not None and threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            signal.signal(signum, _request.handle)


@contextmanager
def noticed(consequence: str = "saving the training's state") -> Iterator[None]:
    """Within it, the first signal is noted instead of ending the process.

    Args:
        consequence: what the process does next, for the message about the signal.

    In threads other than the main one, where Python cannot handle signals, it does nothing.
    """
    global _request
    if _request is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {signum: signal.getsignal(signum) for signum in SIGNALS}
    _request = _Request(consequence)
    install()
    try:
        yield
    finally:
        _request = None
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def outlast_signals() -> None:
    """For processes that load data: signals to the group do not take the images from a training.

    They end with the training. SIGTERM ends them by themselves too, a while later.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(
            signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, WORKER_GRACE_S)
        )
    for signum in SIGNALS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
