"""A norm and its gradients next to a residual connection, for backward passes that recompute it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops.layer_norm_gradients import reference

from .conftest import GRADIENT_TOLERANCE, TOLERANCE, relative_error
from .inference_suite import InferenceSuite


class TestLayerNormGradients(InferenceSuite):
    name = "layer_norm_gradients"
    reference = reference
    others = (1e-5,)
    num_sums = 2

    @staticmethod
    def tolerances(dtype):
        return (*[GRADIENT_TOLERANCE[dtype]] * 4,)

    @staticmethod
    def arguments(u, delta, A, B, C, D, bias, taps):
        return [delta, u * delta / 4, u, D, bias]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_they_are_those_of_autograd(self, dtype, inputs):
        grad, residual, x, weight, bias = inputs(2, 9, 13, 24, dtype=dtype)
        leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
        norm = F.layer_norm(leaves[0], (24,), *leaves[1:])
        branches = (norm, 1 * leaves[0])
        cotangents = (grad.double(), residual.double())
        expected = torch.autograd.grad(branches, leaves, cotangents)
        grad_x, output, *others = ops.layer_norm_gradients(grad, residual, x, weight, bias)
        assert relative_error(output, norm.detach()) <= TOLERANCE[dtype]
        for a, e in zip((grad_x, *others), expected, strict=True):
            assert relative_error(a, e) <= GRADIENT_TOLERANCE[dtype]

    @pytest.mark.parametrize("dim", [1, 2, 64, 300])
    def test_a_constant_token_is_the_bias_and_passes_no_gradient(self, dim):
        x = torch.full((1, 2, 3, dim), 7.5)
        grad, residual = torch.randn(2, 1, 2, 3, 1).expand(-1, -1, -1, -1, dim)
        weight, bias = torch.full((dim,), 2.0), torch.arange(dim, dtype=torch.float32)
        outputs = ops.layer_norm_gradients(grad, residual, x, weight, bias)
        grad_x, output, grad_weight, grad_bias = outputs
        # 1 / sqrt(eps) multiplies what was rounded
        torch.testing.assert_close(grad_x, residual.contiguous(), rtol=0, atol=2e-3)
        torch.testing.assert_close(output, bias.expand_as(x), rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(grad_weight, torch.zeros(dim), rtol=0, atol=2e-3)
        torch.testing.assert_close(grad_bias, grad.sum(dim=(0, 1, 2)))

    def test_a_large_mean_costs_no_more_bits_than_it_has(self, inputs):
        """Sums of squares would cancel; these values and their differences are exact."""
        grad, residual, x, weight, bias = inputs(1, 3, 5, 64)
        x = (64 * x).round() / 64 + 4096
        actual = ops.layer_norm_gradients(grad, residual, x, weight, bias)
        doubles = [t.double() for t in (grad, residual, x, weight, bias)]
        expected = reference.layer_norm_gradients(*doubles, 1e-5)
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) <= 1e-3

    def test_gradients_of_another_dtype(self, inputs):
        grad, residual, x, weight, bias = inputs(1, 4, 5, 24)
        half = x.bfloat16()
        actual = ops.layer_norm_gradients(grad, residual, half, weight, bias)
        rounded = (grad.bfloat16(), residual.bfloat16())
        expected = ops.layer_norm_gradients(*rounded, half, weight, bias)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e)

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (2, 4, 5, 1), r"grad_output must be \[B, H, W, D\] = \[2, 4, 5, 3\], got"),
            (1, (4, 5, 3), r"residual must be \[B, H, W, D\] = \[2, 4, 5, 3\], got \[4, 5, 3\]"),
            (2, (4, 5, 3), r"x must be \[B, H, W, D\]"),
            (3, (2,), r"weight must be \[D\] = \[3\], got \[2\]"),
            (4, (3, 1), r"bias must be \[D\]"),
        ],
    )
    def test_bad_arguments_are_named(self, index, shape, message, inputs):
        self.refuses(inputs(2, 4, 5, 3), index, shape, message)
