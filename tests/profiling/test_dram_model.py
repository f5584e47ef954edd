"""The modelled DRAM traffic; ``tests/ops/test_cuda_emulator.py`` holds it against the kernels."""

from __future__ import annotations

import pytest

from spatial_mamba_d2.profiling.authors_traffic import authors_forward
from spatial_mamba_d2.profiling.dram_model import (
    Launch,
    Operand,
    Problem,
    ssm_backward,
    ssm_forward,
    stage_problems,
    total_bytes,
)


def test_bytes_follow_from_the_operands():
    u, states = Operand("u", (2, 3, 5), 2), Operand("states", (7,), 4)
    launch = Launch("copy", reads=[u, states], writes=[u])
    assert (launch.read_bytes, launch.written_bytes, launch.num_bytes) == (88, 60, 148)
    assert total_bytes([launch, launch]) == 296


def test_operands_have_the_kernels_shapes():
    problem = Problem(2, 37, 33, 35, element_bytes=2, multiprocessors=4)
    *_, fuse = ssm_forward(problem)
    assert {operand.name: operand.shape for operand in fuse.reads} == {
        "u": (2, 37, 33, 35),
        "delta": (2, 37, 33, 35),
        "B": (2, 37, 33),
        "A": (35,),
        "delta_bias": (35,),
        "segment_maps": (74, 2, 35, 2),
        "row_states": (74, 35),
        "C": (2, 37, 33),
        "D": (35,),
        "taps": (25, 35),
    }
    assert fuse.writes == [Operand("y", (2, 37, 33, 35), 2)]
    gradients = {operand.name for launch in ssm_backward(problem) for operand in launch.writes}
    assert gradients >= {f"grad_{x}" for x in "u delta A B C D delta_bias taps".split()}


def test_half_the_authors_bytes_at_every_stage():
    problems = stage_problems()
    assert [problem[1:4] for problem in problems] == [
        (200, 320, 128),
        (100, 160, 256),
        (50, 80, 512),
        (25, 40, 1024),
    ]
    for problem in problems:
        authors = total_bytes(authors_forward(problem))
        assert total_bytes(ssm_forward(problem)) <= 0.5 * authors
        # Twelve tensors of the size of u, and weights.
        assert authors / (4 * problem.num_values) == pytest.approx(12, rel=0.02)
