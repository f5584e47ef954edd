"""Bias, residual and ReLU in one pass, for inference."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops.add_bias import reference

from .inference_suite import InferenceSuite


class TestAddBias(InferenceSuite):
    name = "add_bias_"
    reference = reference
    others = (True,)

    @staticmethod
    def arguments(u, delta, A, B, C, D, bias, taps):
        return [u, bias, delta]

    @pytest.mark.parametrize("relu", [False, True])
    def test_without_a_residual(self, relu, inputs):
        x, bias, _ = inputs(2, 3, 5, 7)
        expected = x + bias
        ops.add_bias_(x, bias, relu=relu)
        torch.testing.assert_close(x, expected.clamp(min=0) if relu else expected)

    def test_what_is_not_a_number_stays(self, inputs):
        x, bias, _ = inputs(1, 2, 2, 4)
        x[0, 0, 0, 0] = torch.nan
        ops.add_bias_(x, bias, relu=True)
        assert x.isnan().sum() == 1 and x[0, 0, 0, 0].isnan()

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (4, 5, 3), r"x must be \[B, H, W, D\]"),
            (1, (2,), r"bias must be \[D\] = \[3\], got \[2\]"),
            (2, (2, 4, 5, 1), r"residual must be \[B, H, W, D\] = \[2, 4, 5, 3\], got"),
        ],
    )
    def test_bad_arguments_are_named(self, index, shape, message, inputs):
        self.refuses(inputs(2, 4, 5, 3), index, shape, message)
