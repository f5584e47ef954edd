"""The convolution with the norm after it, for inference."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm import reference

from .conftest import TOLERANCE, relative_error
from .inference_suite import SHAPES, InferenceSuite


class TestDepthwiseConv3x3LayerNorm(InferenceSuite):
    name = "depthwise_conv3x3_layer_norm"
    reference = reference
    others = (1e-5,)

    @staticmethod
    def arguments(u, delta, A, B, C, D, bias, taps):
        return [u, taps[:9].T.reshape(-1, 1, 3, 3), bias, D, A]

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_norm(self, shape, dtype, inputs):
        """Of y as it was rounded: a difference in y is magnified where values are alike."""
        tensors = inputs(*shape, dtype=dtype)
        y, norm = self.call(tensors)
        normalized = torch.nn.functional.layer_norm(
            y.double(), shape[-1:], *(x.double() for x in tensors[3:])
        )
        assert relative_error(norm, normalized) <= 4 * TOLERANCE[dtype]
        if dtype == torch.float64:
            expected = self.call(tensors, reference)[1]
            assert relative_error(norm, expected) <= 1e-11

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (4, 5, 3), r"x must be \[B, H, W, D\]"),
            (1, (3, 3, 3), r"weight must be \[D, 1, 3, 3\] = \[3, 1, 3, 3\], got \[3, 3, 3"),
            (2, (2,), r"bias must be \[D\] = \[3\], got \[2\]"),
            (3, (2,), r"norm_weight must be \[D\]"),
            (4, (3, 1), r"norm_bias must be \[D\]"),
        ],
    )
    def test_bad_arguments_are_named(self, index, shape, message, inputs):
        self.refuses(inputs(2, 4, 5, 3), index, shape, message)
