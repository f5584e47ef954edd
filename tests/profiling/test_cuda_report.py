"""The CUDA kernels' resources and modelled DRAM traffic stay within their limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.profiling import cuda_report
from spatial_mamba_d2.profiling.cuda_report import Kernel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    """The kernels of the installed library."""
    libraries = sorted(cuda_report.OPS.glob("_cuda*.so"))
    if not libraries:
        pytest.skip(f"no compiled CUDA kernels: {_extension.WHY_NO_CUDA}")
    cuobjdump = cuda_report.find_cuobjdump()
    if not cuobjdump:
        pytest.skip("no cuobjdump, neither in the CUDA toolkit nor in triton")
    return cuda_report.kernels(libraries[0], cuobjdump)


def test_no_kernel_spills_or_is_over_budget(compiled):
    assert cuda_report.over_budget(compiled) == []


def test_every_kernel_runs_on_every_architecture(compiled):
    """A block fits a multiprocessor of each."""
    assert min(kernel.occupancy for kernel in compiled) > 0
    names = {kernel.name.partition("<")[0] for kernel in compiled}
    kinds = {"reduce", "carry", "apply", "apply_adjoint", "fuse_tiles", "grad_input_tiles"}
    assert names == kinds


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stack_bytes": 8}, "apply<float> on 9.0 spills: 8 bytes of stack"),
        ({"registers": 129}, "apply<float> on 9.0 has 129 registers, more than 128"),
    ],
)
def test_a_bad_kernel_is_named(change, problem):
    kernel = Kernel("apply<float>", "9.0", 128, 0, 8, 0)
    assert cuda_report.over_budget([kernel]) == []
    assert cuda_report.over_budget([kernel._replace(**change)]) == [problem]


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared_bytes", "occupancy"),
    [
        ("8.0", 32, 8, 0, 1.0),
        ("8.0", 128, 8, 0, 0.25),  # registers: 2 blocks
        ("8.0", 32, 8, 64512, 0.25),  # shared memory: 2 blocks
        ("9.0", 32, 8, 64512, 0.375),
        ("7.5", 32, 8, 64512, 0.25),
        ("8.6", 16, 1, 0, 1 / 3),  # 16 blocks
    ],
)
def test_occupancy(architecture, registers, warps, shared_bytes, occupancy):
    """By NVIDIA's occupancy calculator."""
    kernel = Kernel("apply<float>", architecture, registers, 0, warps, shared_bytes)
    assert kernel.occupancy == pytest.approx(occupancy)


def test_half_the_authors_bytes_at_every_stage():
    stages = cuda_report.stages()
    assert [stage[1:4] for stage in stages] == [
        (200, 320, 128),
        (100, 160, 256),
        (50, 80, 512),
        (25, 40, 1024),
    ]
    for stage in stages:
        ours = cuda_report.total(cuda_report.ssm_forward(stage))
        authors = cuda_report.total(cuda_report.authors_forward(stage))
        assert ours <= 0.5 * authors
        # Twelve tensors of the size of u, and weights.
        assert authors / (4 * stage.values) == pytest.approx(12, rel=0.02)


def test_the_table_in_the_docs_is_the_models():
    text = (ROOT / "docs/cuda.md").read_text(encoding="utf-8")
    assert cuda_report.dram_table() in text


def test_the_report_is_written(tmp_path, capsys):
    assert cuda_report.main(tmp_path) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "cuda_report.md").read_text() == printed
    figures = json.loads((tmp_path / "cuda_report.json").read_text())
    assert len(figures["stages"]) == 4


def test_a_missing_library_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cuda_report, "find_cuobjdump", lambda: None)
    assert cuda_report.main(tmp_path) == 0
    assert "No resources: there is no" in capsys.readouterr().out
