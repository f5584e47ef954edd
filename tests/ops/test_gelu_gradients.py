"""GELU, its gradient and that of a bias, for backward passes that recompute GELU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops.gelu_gradients import reference

from .conftest import GRADIENT_TOLERANCE, TOLERANCE, relative_error
from .inference_suite import InferenceSuite


class TestGeluGradients(InferenceSuite):
    name = "gelu_gradients"
    reference = reference
    num_sums = 1

    @staticmethod
    def tolerances(dtype):
        return TOLERANCE[dtype], TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]

    @staticmethod
    def arguments(u, delta, A, B, C, D, bias, taps):
        return [delta, 2 * u]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_they_are_those_of_autograd(self, dtype, inputs):
        grad, x = inputs(2, 9, 13, 24, dtype=dtype)
        before = x.double().requires_grad_()
        bias = torch.zeros(24, dtype=torch.float64, requires_grad=True)
        expected = F.gelu(before + bias)
        gradients = torch.autograd.grad(expected, (before, bias), grad.double())
        grad_x, output, grad_sum = ops.gelu_gradients(grad, x)
        assert relative_error(output, expected.detach()) <= TOLERANCE[dtype]
        assert relative_error(grad_x, gradients[0]) <= TOLERANCE[dtype]
        assert relative_error(grad_sum, gradients[1]) <= GRADIENT_TOLERANCE[dtype]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_every_value_is_as_exact_as_the_largest(self, dtype):
        """Errors are compared with 1 for |x| below 1, and with each value above."""
        x = torch.linspace(-20, 20, 2**15).reshape(1, 8, 64, 64).to(dtype)
        actual = ops.gelu_gradients(torch.ones_like(x), x)[:2]
        expected = reference.gelu_gradients(torch.ones_like(x).double(), x.double())[:2]
        for a, e in zip(actual, expected, strict=True):
            assert ((a - e).abs() / e.abs().clamp(min=1)).max() <= TOLERANCE[dtype]

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_large_values_stay_or_become_zero(self, dtype):
        """Also those whose square is infinite."""
        x = torch.tensor([40, 60, 200, 250, 1e3, 1e4, torch.finfo(dtype).max / 4], dtype=dtype)
        x = torch.stack((x, -x)).reshape(1, 2, 1, 7)
        grad_x, output, grad_sum = ops.gelu_gradients(torch.ones_like(x), x)
        assert torch.equal(output[:, :1], x[:, :1]) and not output[:, 1:].any()
        assert torch.equal(grad_x, (x > 0).to(dtype))
        assert grad_sum.tolist() == [1.0] * 7

    def test_what_is_not_a_number_stays(self):
        x = torch.linspace(-2, 2, 40).reshape(1, 2, 1, 20)
        x[0, 1, 0, 3] = torch.nan
        grad = torch.ones_like(x)
        grad[0, 0, 0, 5] = torch.nan
        grad_x, output, grad_sum = ops.gelu_gradients(grad, x)
        assert torch.equal(output.isnan(), x.isnan())
        assert torch.equal(grad_x.isnan(), x.isnan() | grad.isnan())
        assert torch.equal(grad_sum.isnan().nonzero().flatten(), torch.tensor([3, 5]))

    def test_a_gradient_of_another_dtype(self, inputs):
        grad, x = inputs(1, 4, 5, 24)
        expected = ops.gelu_gradients(grad.bfloat16(), x.bfloat16())
        for a, e in zip(ops.gelu_gradients(grad, x.bfloat16()), expected, strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e)

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (2, 4, 5, 1), r"grad_output must be \[B, H, W, D\] = \[2, 4, 5, 3\], got"),
            (1, (4, 5, 3), r"x must be \[B, H, W, D\]"),
        ],
    )
    def test_bad_arguments_are_named(self, index, shape, message, inputs):
        self.refuses(inputs(2, 4, 5, 3), index, shape, message)
