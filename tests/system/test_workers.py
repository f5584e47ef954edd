"""Processes that load data."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The workers would outlast the signal of Python's exit for an hour.
PROGRAM = """
import sys
from torch.utils.data import DataLoader
from spatial_mamba_d2.system import stopping, workers
stopping.WORKER_GRACE_S = 3600
batches = iter(DataLoader(range(100), batch_size=1, **workers.worker_options(2)))
next(batches)
sys.exit(143)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_they_end_with_the_training():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "SMD2_BACKEND": "eager"},  # no warning where nothing is compiled
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (143, "")
