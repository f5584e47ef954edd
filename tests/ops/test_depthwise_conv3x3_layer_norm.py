"""The operator for inference alone, which the conformance suite's gradients do not fit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm import reference

from .conftest import TOLERANCE, relative_error

SHAPES = [(1, 1, 1, 3), (2, 1, 7, 5), (1, 9, 1, 16), (2, 5, 6, 17), (3, 4, 13, 64), (1, 11, 3, 131)]


@pytest.fixture(params=["eager", "native"], autouse=True)
def kernels(request):
    if request.param == "native" and _extension.WHY_NOT_COMPILED:
        pytest.skip(f"no compiled kernels: {_extension.WHY_NOT_COMPILED}")
    eager = _extension.without_compiled_kernels()
    with eager if request.param == "eager" else nullcontext():
        yield request.param


def arguments(batch, height, width, dim, dtype=torch.float32):
    g = torch.Generator().manual_seed(dim)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return [randn(batch, height, width, dim), randn(dim, 1, 3, 3), *(randn(dim) for _ in range(3))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape, dtype):
    args = arguments(*shape, dtype)
    y, norm = ops.depthwise_conv3x3_layer_norm(*args)
    expected_y, expected_norm = reference.depthwise_conv3x3_layer_norm(
        *(x.double() for x in args), 1e-5
    )
    assert relative_error(y, expected_y) <= TOLERANCE[dtype]
    # Of the values as they were rounded: a difference in y would be magnified where they are alike.
    normalised = torch.nn.functional.layer_norm(
        y.double(), shape[-1:], *(args[i].double() for i in (3, 4))
    )
    assert relative_error(norm, normalised) <= 4 * TOLERANCE[dtype]
    if dtype == torch.float64:
        assert relative_error(norm, expected_norm) <= 1e-11
    for output in (y, norm):
        assert output.shape == shape and output.dtype == dtype and output.is_contiguous()


def test_strided_inputs(strided):
    args = arguments(2, 6, 9, 5)
    expected = ops.depthwise_conv3x3_layer_norm(*args)
    for actual, e in zip(
        ops.depthwise_conv3x3_layer_norm(*map(strided, args)), expected, strict=True
    ):
        torch.testing.assert_close(actual, e, rtol=1e-5, atol=1e-6)


def test_every_value_is_written(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        outputs = ops.depthwise_conv3x3_layer_norm(*arguments(2, 7, 13, 21))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in outputs)


def test_number_of_threads_changes_nothing(kernels):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.depthwise_conv3x3_layer_norm(*arguments(2, 9, 14, 40)))
    finally:
        torch.set_num_threads(before)
    tolerance = 0 if kernels == "native" else 1e-5
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_opcheck():
    op = torch.ops.spatial_mamba.depthwise_conv3x3_layer_norm.default
    torch.library.opcheck(
        op, (*arguments(2, 4, 5, 3), 1e-5), test_utils=("test_schema", "test_faketensor")
    )


def test_backward_is_refused():
    args = arguments(1, 3, 4, 5)
    args[0].requires_grad_()
    _, norm = ops.depthwise_conv3x3_layer_norm(*args)
    with pytest.raises(RuntimeError, match="is for inference and has no gradients"):
        norm.sum().backward()


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (4, 5, 3), r"x must be \[B, H, W, D\]"),
        (1, (3, 3, 3), r"weight must be \[D, 1, 3, 3\] = \[3, 1, 3, 3\], got \[3, 3, 3\]"),
        (2, (2,), r"bias must be \[D\] = \[3\], got \[2\]"),
        (3, (2,), r"norm_weight must be \[D\]"),
        (4, (3, 1), r"norm_bias must be \[D\]"),
    ],
)
def test_bad_arguments_are_named(index, shape, message):
    args = arguments(2, 4, 5, 3)
    args[index] = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        ops.depthwise_conv3x3_layer_norm(*args)
