"""The operators for inference alone, which the conformance suite's gradients do not fit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm import reference as conv_norm_reference
from spatial_mamba_d2.ops.low_rank_structure_aware_ssm import reference as ssm_reference

from .conftest import TOLERANCE, relative_error

SHAPES = [(1, 1, 1, 3), (2, 1, 7, 5), (1, 9, 1, 16), (2, 5, 6, 17), (3, 4, 13, 64), (1, 11, 3, 131)]
CONV_NORM, SSM = "depthwise_conv3x3_layer_norm", "low_rank_structure_aware_ssm_"
REFERENCES = {CONV_NORM: conv_norm_reference, SSM: ssm_reference}
BEHIND_TENSORS = {CONV_NORM: (1e-5,), SSM: ()}
each_operator = pytest.mark.parametrize("name", REFERENCES)


@pytest.fixture(params=["eager", "native"], autouse=True)
def kernels(request):
    if request.param == "native" and _extension.WHY_NOT_COMPILED:
        pytest.skip(f"no compiled kernels: {_extension.WHY_NOT_COMPILED}")
    eager = _extension.without_compiled_kernels()
    with eager if request.param == "eager" else nullcontext():
        yield request.param


@pytest.fixture
def inputs(ssm_inputs):
    """``inputs(name, B, H, W, D, dtype)``: the tensors that operator takes."""

    def make(name, *shape, dtype=torch.float32):
        u, delta, A, B, C, D, bias, taps = ssm_inputs(*shape, torch.float64)
        if name == CONV_NORM:
            tensors = [u, taps[:9].T.reshape(-1, 1, 3, 3), bias, D, A]
        else:
            rank = 1 + shape[-1] // 16
            g = torch.Generator().manual_seed(rank)
            dt = torch.randn(*shape[:3], rank, generator=g, dtype=torch.float64)
            weight = torch.randn(shape[-1], rank, generator=g, dtype=torch.float64)
            tensors = [u, dt, weight, A, B, C, D, bias, taps]
        return [x.to(dtype) for x in tensors]

    return make


def call(name, tensors, of=ops):
    """The outputs, in a tuple; what is overwritten is so in a copy with the same strides."""
    first, *rest = tensors
    if name == SSM:
        result = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype)
        getattr(of, name)(result.copy_(first), *rest)
        return (result,)
    return getattr(of, name)(first, *rest, *BEHIND_TENSORS[name])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_operator
def test_against_the_reference(name, shape, dtype, inputs):
    tensors = inputs(name, *shape, dtype=dtype)
    outputs = call(name, tensors)
    expected = call(name, [x.double() for x in tensors], REFERENCES[name])
    assert relative_error(outputs[0], expected[0]) <= TOLERANCE[dtype]
    if name == CONV_NORM:
        y, norm = outputs
        # Of y as it was rounded: a difference in it would be magnified where values are alike.
        normalised = torch.nn.functional.layer_norm(
            y.double(), shape[-1:], *(x.double() for x in tensors[3:])
        )
        assert relative_error(norm, normalised) <= 4 * TOLERANCE[dtype]
        if dtype == torch.float64:
            assert relative_error(norm, expected[1]) <= 1e-11
    for output in outputs:
        assert output.shape == shape and output.dtype == dtype and output.is_contiguous()


def test_the_output_is_the_input(inputs):
    u, *rest = inputs(SSM, 2, 6, 9, 5)
    assert ops.low_rank_structure_aware_ssm_(u, *rest) is u


@each_operator
def test_strided_inputs(name, inputs, strided):
    tensors = inputs(name, 2, 6, 9, 5)
    for actual, expected in zip(
        call(name, map(strided, tensors)), call(name, tensors), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@each_operator
def test_every_value_is_written(name, inputs, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        outputs = call(name, inputs(name, 2, 7, 13, 21))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in outputs)


@pytest.mark.parametrize("shape", [(2, 9, 14, 40), (1, 9, 14, 16)], ids=str)
@each_operator
def test_number_of_threads_changes_nothing(name, shape, inputs, kernels):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call(name, inputs(name, *shape)))
    finally:
        torch.set_num_threads(before)
    tolerance = 0 if kernels == "native" else 1e-5
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_steps_need_not_be_of_low_rank(inputs):
    """With as many terms as channels, and the identity as weight, it is the operator itself."""
    u, _, _, *rest = inputs(SSM, 2, 7, 9, 21)
    delta = torch.randn(u.shape, generator=torch.Generator().manual_seed(0))
    expected = ops.structure_aware_ssm(u, delta, *rest)
    actual = ops.low_rank_structure_aware_ssm_(u, delta, torch.eye(21), *rest)
    torch.testing.assert_close(actual, expected)


@each_operator
def test_opcheck(name, inputs):
    op = getattr(torch.ops.spatial_mamba, name).default
    tensors = inputs(name, 2, 4, 5, 3)
    torch.library.opcheck(
        op, (*tensors, *BEHIND_TENSORS[name]), test_utils=("test_schema", "test_faketensor")
    )


@each_operator
def test_empty_batch(name, inputs):
    tensors = [x[:0] if x.dim() > 2 and len(x) == 1 else x for x in inputs(name, 1, 3, 4, 2)]
    assert all(output.shape == (0, 3, 4, 2) for output in call(name, tensors))


@each_operator
def test_backward_is_refused(name, inputs):
    tensors = inputs(name, 1, 3, 4, 5)
    tensors[1].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} is for inference and has no gradients"):
        call(name, tensors)[-1].sum().backward()


@pytest.mark.parametrize(
    ("name", "index", "shape", "message"),
    [
        (CONV_NORM, 0, (4, 5, 3), r"x must be \[B, H, W, D\]"),
        (CONV_NORM, 1, (3, 3, 3), r"weight must be \[D, 1, 3, 3\] = \[3, 1, 3, 3\], got \[3, 3, 3"),
        (CONV_NORM, 2, (2,), r"bias must be \[D\] = \[3\], got \[2\]"),
        (CONV_NORM, 3, (2,), r"norm_weight must be \[D\]"),
        (CONV_NORM, 4, (3, 1), r"norm_bias must be \[D\]"),
        (SSM, 0, (4, 5, 3), r"u must be \[B, H, W, D\]"),
        (SSM, 1, (2, 4, 5), r"dt must be \[B, H, W, R\]"),
        (SSM, 1, (2, 4, 5, 0), r"dt must be \[B, H, W, R\] with no empty axis"),
        (SSM, 1, (2, 4, 6, 1), r"dt must be \[B, H, W, R\] = \[2, 4, 5, 1\], got \[2, 4, 6, 1\]"),
        (SSM, 2, (3, 2), r"dt_weight must be \[D, R\] = \[3, 1\], got \[3, 2\]"),
        (SSM, 3, (2,), r"A must be \[D\]"),
        (SSM, 4, (2, 4), r"B must be \[B, H, W\]"),
        (SSM, 5, (2, 4, 5, 1), r"C must be \[B, H, W\]"),
        (SSM, 6, (2,), r"D must be \[D\]"),
        (SSM, 7, (4,), r"delta_bias must be \[D\]"),
        (SSM, 8, (24, 3), r"taps must be \[25, D\] = \[25, 3\], got \[24, 3\]"),
    ],
)
def test_bad_arguments_are_named(name, index, shape, message, inputs):
    tensors = inputs(name, 2, 4, 5, 3)
    tensors[index] = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        call(name, tensors)
