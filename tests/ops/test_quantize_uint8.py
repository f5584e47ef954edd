"""Quantisation of activations to 8 bits, for inference."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from spatial_mamba_d2.ops import _extension, quantize_uint8
from spatial_mamba_d2.ops.quantize_uint8 import reference


@pytest.fixture(params=["eager", "native"], autouse=True)
def kernels(request):
    if request.param == "native" and _extension.WHY_NOT_COMPILED:
        pytest.skip(f"no compiled kernels: {_extension.WHY_NOT_COMPILED}")
    is_eager = request.param == "eager"
    with _extension.without_compiled_kernels() if is_eager else nullcontext():
        yield


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 5, 7), (2, 4099), (2, 3, 5, 16)], ids=str)
@pytest.mark.parametrize(("scale", "zero_point"), [(0.02, 120), (0.1, 0), (0.05, 255), (7.0, 3)])
def test_against_the_reference(dtype, shape, scale, zero_point):
    """Values within rounding errors of half a step may become either of two."""
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    actual = quantize_uint8(x, scale, zero_point)
    expected = reference.quantize_uint8(x, scale, zero_point)
    assert actual.shape == expected.shape and actual.dtype == torch.uint8
    steps = x.double() / scale
    is_tie = (steps - steps.floor() - 0.5).abs() <= 1e-5 * steps.abs().clamp(min=1)
    assert torch.equal(actual[~is_tie], expected[~is_tie])
    assert ((actual.int() - expected.int()).abs() <= is_tie.int()).all()


def test_halves_go_to_even_numbers_and_the_rest_is_limited():
    x = torch.tensor([-1e30, -2.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 252.0, 253.0, 1e30])
    assert quantize_uint8(x, 1.0, 2).tolist() == [0, 0, 0, 2, 2, 2, 4, 4, 254, 255, 255]


def test_what_is_dequantised_is_within_half_a_step():
    x = torch.linspace(-1, 1, 1001)
    scale, zero_point = 2 / 255, 127
    back = (quantize_uint8(x, scale, zero_point).float() - zero_point) * scale
    assert (back - x).abs().max() <= 0.505 * scale + scale / 2  # the range is not centred on 127


def test_strided_input(strided):
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(quantize_uint8(strided(x), 0.02, 100), quantize_uint8(x, 0.02, 100))


def test_number_of_threads_changes_nothing():
    before, x = torch.get_num_threads(), torch.randn(50_001)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(quantize_uint8(x, 0.02, 100))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("position", [0, 4999])
def test_what_is_not_finite_is_refused(value, position):
    x = torch.zeros(5000)
    x[position] = float(value)
    with pytest.raises(RuntimeError, match="quantize_uint8: x must be finite"):
        quantize_uint8(x, 1.0, 0)


def test_arguments_are_checked():
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"scale must be above 0, got 0\.0"):
        quantize_uint8(x, 0.0, 0)
    with pytest.raises(ValueError, match="zero_point must be from 0 to 255, got 256"):
        quantize_uint8(x, 1.0, 256)
    with pytest.raises(ValueError, match=r"x must be floating point, got torch\.int64"):
        quantize_uint8(x.long(), 1.0, 0)
    assert not quantize_uint8(x.requires_grad_(), 1.0, 0).requires_grad


def test_opcheck():
    op = torch.ops.spatial_mamba.quantize_uint8.default
    torch.library.opcheck(
        op, (torch.randn(2, 3), 0.02, 100), test_utils=("test_schema", "test_faketensor")
    )
