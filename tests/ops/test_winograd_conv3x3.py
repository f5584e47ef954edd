"""3x3 convolutions by Winograd's algorithm, for inference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops.winograd_conv3x3 import reference

from .conftest import TOLERANCE, relative_error
from .inference_suite import InferenceSuite


class TestWinogradConv3x3(InferenceSuite):
    name = "winograd_conv3x3"
    reference = reference
    others = (True,)

    @staticmethod
    def arguments(u, delta, A, B, C, D, bias, taps):
        dim = u.shape[-1]
        g = torch.Generator().manual_seed(dim)
        weight = torch.randn(dim, dim, 3, 3, generator=g, dtype=torch.float64)
        return [u, ops.winograd_weight(weight / dim), bias]

    @pytest.mark.parametrize(
        "shape", [(1, 1, 1, 3, 5), (2, 7, 4, 17, 33), (1, 11, 9, 300, 64)], ids=str
    )
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_it_is_the_convolution(self, shape, dtype):
        """More than 256 input channels are multiplied in parts."""
        batch, height, width, dim, out_dim = shape
        g = torch.Generator().manual_seed(0)
        x = torch.randn(batch, height, width, dim, generator=g, dtype=torch.float64)
        weight = torch.randn(out_dim, dim, 3, 3, generator=g, dtype=torch.float64)
        bias = torch.randn(out_dim, generator=g, dtype=torch.float64)
        expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
        tensors = [t.to(dtype) for t in (x, ops.winograd_weight(weight), bias)]
        actual = ops.winograd_conv3x3(*tensors)
        assert actual.shape == expected.shape and actual.is_contiguous()
        assert relative_error(actual, expected) <= 2 * TOLERANCE[dtype]
        rectified = ops.winograd_conv3x3(*tensors, relu=True)
        assert torch.equal(rectified, actual.relu())

    def test_what_is_not_a_number_stays(self, inputs):
        x, *rest = inputs(1, 9, 9, 4)
        x[0, 8, 8, 0] = torch.nan
        y = ops.winograd_conv3x3(x, *rest, relu=True)
        assert y[0, 7:, 7:].isnan().all() and not y[0, :4, :4].isnan().any()

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (4, 5, 3), r"x must be \[B, H, W, C\]"),
            (1, (36, 2, 4, 16), r"weight must be \[36, P, C, 16\] = \[36, 2, 3, 16\], got"),
            (2, (40,), r"weight must be \[36, P, C, 16\] = \[36, 4, 3, 16\], got"),
            (2, (3, 1), r"bias must be \[O\]"),
        ],
    )
    def test_bad_arguments_are_named(self, index, shape, message, inputs):
        self.refuses(inputs(2, 4, 5, 3), index, shape, message)
