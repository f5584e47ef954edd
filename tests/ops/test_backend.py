"""The choice of kernels by ``SMD2_BACKEND``, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension
torch.manual_seed(0)
h = ops.state_fusion(torch.randn(1, 4, 4, 2), torch.randn(25, 2))
print(_extension.status(), h.sum().item(), sep="|")
"""


def run(backend: str | None) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "SMD2_BACKEND"}
    if backend is not None:
        env["SMD2_BACKEND"] = backend
    return subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)


def test_forced_backends_agree():
    sums = []
    for backend in ("reference", "eager"):
        done = run(backend)
        assert done.returncode == 0, done.stderr
        status, total = done.stdout.split("|")
        assert status == f"{backend} (forced by SMD2_BACKEND)"
        sums.append(float(total))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_unknown_backend_is_refused():
    done = run("fast")
    assert done.returncode != 0
    assert "SMD2_BACKEND must be one of reference, eager, native, got 'fast'" in done.stderr


def test_native_never_falls_back():
    done = run("native")
    assert done.returncode != 0
    assert "SMD2_BACKEND=native, but there are no compiled kernels" in done.stderr
