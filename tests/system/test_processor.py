"""The processor's name and abilities are what PyTorch and Linux say."""

from __future__ import annotations

import types

import pytest
import torch

from spatial_mamba_d2.system import processor
from spatial_mamba_d2.system.processor import describe_processor, in_words

LINUX = "processor\t: 0\nmodel name\t: A: fast one\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
ARM = "processor\t: 0\nFeatures\t: asimd sve bf16 i8mm\n"


@pytest.fixture
def cpuinfo(monkeypatch, tmp_path):
    def write(text):
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        monkeypatch.setattr(processor, "_CPUINFO", path)

    return write


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_vnni": True, "amx_tile": False, "cache": 48},
         ["AVX2", "AVX-512", "VNNI"]),
        ({"avx2": True, "avx512_bf16": True, "amx_tile": True, "amx_bf16": True},
         ["AVX2", "bfloat16", "AMX", "AMX bfloat16"]),
        ({"neon": True, "bf16": True, "sve_max_length": 32}, ["bfloat16"]),
    ],
)  # fmt: skip
def test_abilities_that_pytorch_tells(monkeypatch, capabilities, expected):
    read = types.MappingProxyType(capabilities)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: read, raising=False)
    assert describe_processor()["abilities"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [(LINUX, ["AVX2", "AVX-512", "bfloat16"]), (ARM, ["SVE", "bfloat16", "i8mm"]), ("", [])],
)
def test_abilities_that_only_linux_tells(monkeypatch, cpuinfo, text, expected):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    cpuinfo(text)
    assert describe_processor()["abilities"] == expected


def test_the_name_is_that_of_linux_or_of_python(monkeypatch, cpuinfo):
    cpuinfo(LINUX)
    assert describe_processor()["processor"] == "A: fast one"
    cpuinfo(ARM)
    monkeypatch.setattr(processor.platform, "processor", lambda: "")
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert describe_processor()["processor"] == "aarch64"


def test_in_words():
    machine = {"processor": "P", "abilities": ["AVX2", "AMX"], "threads": 2, "capability": "AVX2"}
    assert in_words(machine) == "P (AVX2, AMX), 2 threads, AVX2 kernels of PyTorch"
    assert in_words(machine | {"abilities": [], "torch": "2"}).startswith("P, 2 threads, ")
