"""The choice of kernels by ``SMD2_BACKEND``, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.cuda.nvrtc import UnavailableError

PROGRAM = """
import torch
from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension
torch.manual_seed(0)
u, delta = torch.randn(2, 2, 6, 7, 21)
B, C = torch.randn(2, 2, 6, 7)
A, D, bias = -torch.rand(21), torch.randn(21), torch.randn(21)
inputs = [x.requires_grad_() for x in (u, delta, A, B, C, D, bias, torch.randn(25, 21))]
y = ops.structure_aware_ssm(*inputs)
total = y.abs().sum() + sum(g.abs().sum() for g in torch.autograd.grad(y.square().sum(), inputs))
print(_extension.status(), total.item(), sep="|")
"""

# the same with second and forward-mode derivatives
MORE_DERIVATIVES = PROGRAM.replace(
    "print(",
    """
gradients = torch.autograd.grad(ops.structure_aware_ssm(*inputs).square().sum(), inputs,
                                create_graph=True)
penalty = sum(g.square().sum() for g in gradients) / 1e5
total = total + sum(g.abs().sum() for g in torch.autograd.grad(penalty, inputs))
tangents = tuple(map(torch.ones_like, inputs))
total = total + torch.func.jvp(ops.structure_aware_ssm, tuple(inputs), tangents)[1].abs().sum()
print(""",
)

# as with a PyTorch that is new enough for a library
NO_LIBRARY = """
import pathlib, torch
torch.__version__ = "99.0"
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **options: self.name != "_C.so" and exists(self, **options)
"""


def run(backend: str, program: str = PROGRAM, **more: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "SMD2_BACKEND": backend, **more}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


def test_forced_backends_agree():
    sums = []
    for backend in ("reference", "eager"):
        done = run(backend, MORE_DERIVATIVES)
        assert done.returncode == 0, done.stderr
        status, total = done.stdout.split("|")
        assert status == f"{backend} on every device: SMD2_BACKEND is {backend}"
        sums.append(float(total))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_unknown_backend_is_refused():
    done = run("fast")
    assert done.returncode != 0
    assert "SMD2_BACKEND must be one of reference, eager, native, got 'fast'" in done.stderr


def test_native_never_falls_back():
    """Without a compiled library, importing fails."""
    program = PROGRAM.replace("import torch\n", NO_LIBRARY, 1)
    done = run("native", program=program)
    assert done.returncode != 0
    assert "SMD2_BACKEND is native, but CPU kernels are missing: no compiled" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


def test_without_a_library_it_runs_and_warns_once():
    program = PROGRAM.replace("import torch\n", NO_LIBRARY, 1)
    done = run("", program=program)
    assert done.returncode == 0
    device = "every device" if _extension.why_no_cuda() else "the CPU"
    assert f"eager on {device}: no compiled kernels were built" in done.stdout
    assert done.stderr.count("falling back to plain PyTorch operators (slower): no compiled") == 1
    assert "Install a C++ compiler and run: pip install" in done.stderr


def test_a_pytorch_without_the_stable_abi_runs_plain_operators():
    """The library would not load there: its functions came with PyTorch 2.10."""
    old = PROGRAM.replace("import torch\n", "import torch\ntorch.__version__ = '2.9.1+cpu'\n", 1)
    done = run("", program=old)
    assert done.returncode == 0
    reason = "compiled kernels need PyTorch 2.10 or newer, but this is 2.9.1+cpu"
    assert reason in done.stdout
    assert done.stderr.count(f"plain PyTorch operators (slower): {reason}") == 1
    done = run("native", program=old)
    assert done.returncode != 0 and f"CPU kernels are missing: {reason}" in done.stderr


def unavailable(*inputs):
    raise UnavailableError("this GPU is too old")


def test_native_never_falls_back_on_other_devices(monkeypatch):
    monkeypatch.setattr(_extension, "FORCED_BACKEND", "native")
    called = _extension._cuda_or_plain(unavailable, lambda x: x)
    message = "SMD2_BACKEND is native, but cuda kernels are missing: this GPU is too old"
    with pytest.raises(RuntimeError, match=message):
        called(1)


def test_where_cuda_kernels_cannot_run_plain_pytorch_does(monkeypatch, caplog):
    monkeypatch.setattr(_extension, "FORCED_BACKEND", None)
    _extension._warn_slow.cache_clear()
    called = _extension._cuda_or_plain(unavailable, lambda x: 2 * x)
    assert [called(1), called(2)] == [2, 4]
    (record,) = caplog.records
    message = "falling back to plain PyTorch operators on cuda (slower): this GPU is too old"
    assert record.getMessage() == message


def test_errors_of_cuda_kernels_are_not_hidden():
    def fail(x):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        _extension._cuda_or_plain(fail, lambda x: x)(1)


def test_plain_pytorch_on_another_device_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(_extension, "FORCED_BACKEND", None)
    _extension._warn_slow.cache_clear()
    for _ in range(2):
        _extension._on_fallback("xpu", "compiled kernels exist for CPU and CUDA only")
    (record,) = caplog.records
    assert "plain PyTorch operators on xpu (slower): compiled kernels exist" in record.getMessage()


@pytest.mark.parametrize("operator", _extension.CUDA_KERNELS)
def test_the_dispatcher_knows_the_cuda_kernels(operator):
    """This needs no GPU, because they are compiled at their first call."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"spatial_mamba::{operator}", "CUDA")


def test_status_names_what_runs(monkeypatch):
    monkeypatch.setattr(_extension, "FORCED_BACKEND", None)
    monkeypatch.setattr(_extension, "WHY_NOT_COMPILED", None)
    monkeypatch.setattr(_extension, "why_no_cuda", lambda: None)
    monkeypatch.setattr(_extension.nvrtc, "version", lambda: (13, 0))
    assert _extension.status() == (
        "native on the CPU (compiled) and CUDA (compiled at the first call, by NVRTC 13.0), "
        "eager on other devices"
    )
    monkeypatch.setattr(_extension, "WHY_NOT_COMPILED", "no compiler")
    assert _extension.status() == (
        "native on CUDA (compiled at the first call, by NVRTC 13.0), eager on the CPU: no compiler"
    )
    monkeypatch.setattr(_extension, "why_no_cuda", lambda: "no NVRTC")
    assert _extension.status() == "eager on every device: no compiler"


@pytest.mark.skipif(bool(_extension.WHY_NOT_COMPILED), reason="no compiled kernels")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="versions are x86-64's")
def test_versions_for_other_processors_agree():
    """The baseline and AVX2 versions, which are in every x86-64 build, on this machine."""
    sums = []
    for capability in ("baseline", "avx2", "avx512"):
        done = run("native", SMD2_CPU_CAPABILITY=capability)
        assert done.returncode == 0, done.stderr
        sums.append(float(done.stdout.split("|")[1]))
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)
