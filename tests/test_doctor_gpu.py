"""What the doctor says of GPUs and their kernels."""

from __future__ import annotations

import re

import pytest

from spatial_mamba_d2 import doctor
from spatial_mamba_d2.doctor import Finding


@pytest.fixture
def nvrtc(monkeypatch, tmp_path):
    """NVRTC, or a skip with the reason; the cache is a folder of the test."""
    from spatial_mamba_d2.ops import _extension
    from spatial_mamba_d2.ops.cuda import nvrtc

    if reason := _extension.why_no_cuda():
        pytest.skip(reason)
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path / "cache"))
    return nvrtc


def test_what_a_gpu_would_get(nvrtc, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = doctor.check_cuda_kernels()
    assert finding.status == "ok"
    assert re.fullmatch(
        r"NVRTC \d+\.\d+ compiles them at their first call, for sm_7\d to sm_\d+", finding.text
    )


def test_what_a_gpu_gets(nvrtc, monkeypatch, tmp_path):
    import torch

    capabilities = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    finding = doctor.check_cuda_kernels()
    assert finding.status == "ok"
    assert finding.text.endswith(
        f"at their first call, and keeps them in {tmp_path / 'cache/cuda'}"
    )

    (tmp_path / "file").touch()
    monkeypatch.setenv("SMD2_CACHE", str(tmp_path / "file"))
    finding = doctor.check_cuda_kernels()
    assert finding.status == "note" and finding.fix == "set SMD2_CACHE to a folder"

    capabilities.append((6, 1))
    finding = doctor.check_cuda_kernels()
    assert finding.status == "note"
    assert finding.text.startswith("none on GPU 1, which runs plain PyTorch: this GPU has compute")


def test_without_nvrtc_a_gpu_runs_plain_pytorch(monkeypatch):
    import torch

    from spatial_mamba_d2.ops import _extension

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_extension, "why_no_cuda", lambda: "NVRTC is not found")
    finding = doctor.check_cuda_kernels()
    assert finding == Finding("note", "none, so a GPU runs plain PyTorch: NVRTC is not found")


def test_kernels_are_compiled_ahead(nvrtc, monkeypatch, capsys, tmp_path):
    from spatial_mamba_d2.ops.cuda.kernels import KernelSet
    from spatial_mamba_d2.ops.state_fusion import cuda as fusion

    monkeypatch.setattr(KernelSet, "ALL", [fusion.FORWARD])
    assert doctor.main(["--compile", "80", "90"]) == 0
    printed = capsys.readouterr().out
    assert "sm_80 state_fusion/fusion.cuh torch.bfloat16\n" in printed
    assert f"compiled for sm_80, sm_90, in {tmp_path / 'cache/cuda'}" in printed
    assert len(list((tmp_path / "cache/cuda").iterdir())) == 2 * 3
    assert doctor.main(["--compile", "61"]) == 1
    assert "not for 61" in capsys.readouterr().out


def test_without_a_gpu_the_architectures_are_asked_for(nvrtc, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert doctor.main(["--compile"]) == 1
    assert "no GPU is here: name the architectures" in capsys.readouterr().out
