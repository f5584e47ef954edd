"""The CUDA kernels' registers and occupancy stay within their limits."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2.ops.cuda import nvrtc
from spatial_mamba_d2.profiling.kernel_resources import (
    LIMITS,
    Kernel,
    compile_all,
    over_budget,
    resource_table,
)


@pytest.fixture(scope="module")
def architectures() -> tuple[int, ...]:
    """What NVRTC compiles for."""
    try:
        return nvrtc.architectures()
    except nvrtc.UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        (75, torch.float16),
        pytest.param(80, torch.float32, marks=pytest.mark.long),
        (90, torch.float64),
        pytest.param(100, torch.bfloat16, marks=pytest.mark.long),
        (120, torch.float16),
    ],
    ids=str,
)
def test_no_kernel_spills_or_is_over_budget(architecture, dtype, architectures):
    """Each generation and each dtype once: they differ in loads and stores only.

    Architectures of one generation have the same instructions; ``dev.py cuda-report`` compiles for
    any. ``test_cuda_report.py`` compiles float32 for 9.0.
    """
    if architecture not in architectures:
        pytest.skip(f"NVRTC compiles for {architectures}")
    kernels = compile_all([architecture], [dtype])
    assert over_budget(kernels) == []
    assert min(kernel.occupancy for kernel in kernels) > 0
    names = {kernel.name.partition("<")[0] for kernel in kernels}
    assert names >= {"reduce", "carry", "apply", "apply_adjoint", "fuse_tiles", "grad_input_tiles"}


def test_the_limits_of_all_architectures_are_known(architectures):
    assert {f"{number // 10}.{number % 10}" for number in architectures} <= set(LIMITS)


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
