"""The gate's output and gradients, that of the gate where it belongs."""

from __future__ import annotations

import math

import pytest
import torch

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops.gated_layer_norm import reference

from .conftest import GRADIENT_TOLERANCE, TOLERANCE, relative_error
from .test_conformance import arguments
from .written_gradient_suite import WrittenGradientSuite


class TestGatedLayerNormGradients(WrittenGradientSuite):
    name = "gated_layer_norm_gradients_"
    reference = reference
    others = (1e-5,)
    written, of = "grad_z", "z"

    @staticmethod
    def tolerances(dtype):
        return (*[GRADIENT_TOLERANCE[dtype]] * 5,)

    @staticmethod
    def arguments(*ssm_inputs):
        u, delta, _, _, _, D, *_ = ssm_inputs
        return [torch.full_like(u, math.nan), u * D, *arguments("gated_layer_norm", [*ssm_inputs])]

    def expected(self, tensors):
        grad_y, grad_z, *others = super().expected(tensors)
        return grad_z, grad_y, None, *others

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_the_output_is_that_of_the_forward_pass(self, dtype, inputs):
        tensors = inputs(2, 9, 13, 24, dtype=dtype)
        expected = ops.gated_layer_norm(*[x.double() for x in tensors[2:]])
        assert relative_error(self.call(tensors)[2], expected) <= TOLERANCE[dtype]

    @pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")])
    def test_a_gate_of_another_dtype(self, dtypes, inputs):
        of_y, of_z = (getattr(torch, name) for name in dtypes)
        grad_z, grad, y, z, *others = inputs(2, 4, 5, 24)
        tensors = [grad_z.to(of_z), grad, y.to(of_y), z.to(of_z), *others]
        outputs = self.call(tensors)
        assert outputs[2].dtype == of_y
        for actual, expected in zip(outputs, self.expected(tensors), strict=True):
            if expected is not None:
                assert actual.dtype == expected.dtype and torch.equal(actual, expected)

    @pytest.mark.parametrize("dim", [2048, 2052])
    def test_more_channels_than_a_block_has(self, dim, inputs):
        """On CUDA devices, plain PyTorch computes these."""
        tensors = inputs(1, 2, 3, dim)
        expected = self.call([x.double() for x in tensors], reference)
        for actual, e in zip(self.call(tensors), expected, strict=True):
            assert relative_error(actual, e) <= 5 * TOLERANCE[torch.float32]

    @pytest.mark.parametrize(
        ("index", "shape", "message"),
        [
            (0, (4, 5, 3), r"grad_z must have the shape of z, \[2, 4, 5, 3\], got \[4, 5, 3\]"),
            (1, (2, 4, 5, 1), r"grad_output must be \[B, H, W, D\] = \[2, 4, 5, 3\], got"),
            (2, (4, 5, 3), r"y must be \[B, H, W, D\]"),
            (3, (4, 5, 3), r"z must be \[B, H, W, D\] = \[2, 4, 5, 3\], got"),
            (4, (2,), r"weight must be \[D\] = \[3\], got \[2\]"),
            (5, (3, 1), r"bias must be \[D\]"),
        ],
    )
    def test_bad_arguments_are_named(self, index, shape, message, inputs):
        tensors = inputs(2, 4, 5, 3)
        tensors[index] = torch.ones(shape)
        with pytest.raises(ValueError, match=f"{self.name}: {message}"):
            ops.gated_layer_norm_gradients_(*tensors)
