"""The CUDA kernels' registers and occupancy stay within their limits."""

from __future__ import annotations

import pytest

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.profiling.kernel_constants import OPS
from spatial_mamba_d2.profiling.kernel_resources import (
    Kernel,
    find_cuobjdump,
    over_budget,
    read_kernels,
    resource_table,
)


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    """The kernels of the installed library."""
    libraries = sorted(OPS.glob("_cuda*.so"))
    if not libraries:
        pytest.skip(f"no compiled CUDA kernels: {_extension.WHY_NO_CUDA}")
    cuobjdump = find_cuobjdump()
    if not cuobjdump:
        pytest.skip("no cuobjdump, neither in the CUDA toolkit nor in triton")
    return read_kernels(libraries[0], cuobjdump)


def test_no_kernel_spills_or_is_over_budget(compiled):
    assert over_budget(compiled) == []


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
    assert over_budget([kernel]) == []
    assert over_budget([kernel._replace(**change)]) == [problem]


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


def test_one_row_per_kernel():
    kernel = Kernel("apply<float>", "8.0", 128, 0, 8, 64512)
    other = kernel._replace(architecture="10.0", stack_bytes=8)
    assert resource_table([other, kernel]).splitlines()[::2] == [
        "| kernel | threads | shared KiB | 8.0 | 10.0 |",
        "| apply<float> | 256 | 63 | 128, 25% | 128, 25%, SPILLS 8 |",
    ]
