"""Signals that end a training: noted once, passed through the second time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from spatial_mamba_d2.system import stopping

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")


@pytest.mark.parametrize("signum", stopping.SIGNALS)
def test_the_first_signal_is_noted(signum):
    before = signal.getsignal(signum)
    with stopping.noticed():
        stopping.stop_if_requested()
        signal.raise_signal(signum)
        signal.raise_signal(signum)  # as a launcher passes on what the terminal sent to all
        assert stopping.requested() == signum
        with pytest.raises(stopping.Stopped) as stopped:
            stopping.stop_if_requested()
    assert stopped.value.code == 128 + signum
    assert stopping.requested() == 0 and signal.getsignal(signum) is before


def test_our_handlers_come_back():
    with stopping.noticed():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library does
        stopping.install()
        signal.raise_signal(signal.SIGTERM)
        assert stopping.requested() == signal.SIGTERM
    stopping.install()  # without effect outside
    assert stopping.requested() == 0


def test_other_threads_are_left_alone():
    seen = []

    def body():
        with stopping.noticed():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_second_signal_ends_at_once():
    program = (
        "import signal\n"
        "from spatial_mamba_d2.system import stopping\n"
        "stopping.SAME_REQUEST_S = 0\n"
        "with stopping.noticed():\n"
        "    signal.raise_signal(signal.SIGTERM); print('noted', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM); print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "noted\n"
    assert "SIGTERM: saving the training's state" in done.stderr
