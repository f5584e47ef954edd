"""The gradients of the depthwise convolution, that of the input where it belongs."""

from __future__ import annotations

import math

import pytest
import torch

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops.depthwise_conv3x3 import reference

from .conftest import GRADIENT_TOLERANCE
from .test_conformance import arguments
from .written_gradient_suite import WrittenGradientSuite


class TestDepthwiseConv3x3Gradients(WrittenGradientSuite):
    name = "depthwise_conv3x3_gradients_"
    reference = reference
    others: tuple = (False,)
    written, of = "grad_x", "x"

    @staticmethod
    def tolerances(dtype):
        return (*[GRADIENT_TOLERANCE[dtype]] * 3,)

    @staticmethod
    def arguments(*ssm_inputs):
        x, delta, *_ = ssm_inputs
        grad_x = torch.full_like(x, math.nan)
        return [grad_x, delta, *arguments("depthwise_conv3x3", list(ssm_inputs))]

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (4, 5, 3), r"grad_x must have the shape of x, \[2, 4, 5, 3\], got \[4, 5, 3\]"),
            (1, (2, 4, 5, 1), r"grad_output must be \[B, H, W, D\] = \[2, 4, 5, 3\], got"),
            (2, (4, 5, 3), r"x must be \[B, H, W, D\]"),
            (3, (3, 3, 3), r"weight must be \[D, 1, 3, 3\]"),
            (4, (3, 1), r"bias must be \[D\]"),
        ],
    )
    def test_bad_arguments_are_named(self, index, shape, message, inputs):
        tensors = inputs(2, 4, 5, 3)
        tensors[index] = torch.ones(shape)
        with pytest.raises(ValueError, match=f"{self.name}: {message}"):
            ops.depthwise_conv3x3_gradients_(*tensors, *self.others)


class TestWithAResidualConnection(TestDepthwiseConv3x3Gradients):
    others = (True,)
