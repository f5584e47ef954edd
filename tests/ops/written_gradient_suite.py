"""What holds for operators that write the gradient of a map into memory that they are given."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spatial_mamba_d2 import ops

from .conftest import TOLERANCE
from .inference_suite import InferenceSuite

#: from ``[B, H, W, D]`` and a function that makes a tensor of a shape: the tensor, and its part
#: into which a gradient is written
LAYOUTS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "contiguous": lambda new, b, h, w, d: (all_of := new(b, h, w, d), all_of),
    "first half": lambda new, b, h, w, d: (all_of := new(b, h, w, 2 * d), all_of[..., :d]),
    "last third": lambda new, b, h, w, d: (all_of := new(b, h, w, 3 * d), all_of[..., 2 * d :]),
    "odd address": lambda new, b, h, w, d: (all_of := new(b, h, w, d + 4), all_of[..., 1 : 1 + d]),
    "odd stride": lambda new, b, h, w, d: (all_of := new(b, h, w, d + 1), all_of[..., :d]),
    # not as kernels write it
    "columns first": lambda new, b, h, w, d: (all_of := new(b, w, h, d), all_of.transpose(1, 2)),
    "channels first": lambda new, b, h, w, d: (all_of := new(b, d, h, w), all_of.movedim(1, -1)),
    "inner rows": lambda new, b, h, w, d: (all_of := new(b, h + 2, w, d), all_of[:, 1:-1]),
}


class WrittenGradientSuite(InferenceSuite):
    """All calls write into the second half of a map, whose first half has to stay.

    An operator ``<operator>_gradients_`` returns what else a backward pass needs, at the end the
    gradients of two parameters, which are the last tensors that it takes.
    """

    num_sums = 2
    written: str  # name of the first argument
    of: str  # name of the map whose gradient it is

    def call(self, tensors, of=ops):
        first, *rest = tensors
        dim = first.shape[-1]
        halves = torch.full((*first.shape[:-1], 2 * dim), math.nan, dtype=first.dtype)
        written = halves[..., dim:].copy_(first)
        outputs = getattr(of, self.name)(written, *rest, *self.others)
        assert halves[..., :dim].isnan().all()
        return written.contiguous(), *outputs

    def sums_like(self, tensors):
        return tensors[-2:]

    def expected(self, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
        """The outputs from the backward operator, and None for what it does not compute."""
        backward = f"{self.name.removesuffix('_gradients_')}_backward"
        return getattr(torch.ops.spatial_mamba, backward)(*tensors[1:], *self.others)

    @pytest.mark.parametrize("shape", [(2, 9, 13, 24), (1, 5, 6, 17), (3, 4, 5, 132)], ids=str)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_bits_are_those_of_the_backward_operator(self, dtype, shape, inputs):
        tensors = inputs(*shape, dtype=dtype)
        for actual, expected in zip(self.call(tensors), self.expected(tensors), strict=True):
            assert expected is None or torch.equal(actual, expected)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_only_the_memory_of_the_gradient_is_written(self, dtype, layout, inputs, kernels):
        tensors = inputs(2, 5, 7, 24, dtype=dtype)

        def new(*shape: int) -> Tensor:
            return torch.full(shape, math.nan, dtype=dtype)

        memory, written = LAYOUTS[layout](new, *tensors[0].shape)
        returned = getattr(ops, self.name)(written, *tensors[1:], *self.others)
        expected = self.expected(tensors)
        # Where neighbours cannot be stored at once, sums of parameters have another order.
        tolerance = 1e-5 if kernels == "emulated CUDA" and "odd" in layout else 0
        for a, e in zip((written, *returned), expected, strict=True):
            if e is None:
                continue
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
        assert memory.isfinite().sum() == written.numel()

    def test_another_dtype_or_shape_is_refused(self, inputs, kernels):
        """By the schema's operator as well, whose kernels would write elsewhere."""
        first, *rest = inputs(2, 4, 5, 3)
        operators = (
            (ops, f"{self.written} must have the dtype of {self.of}, torch.float32, got torch.flo"),
            (torch.ops.spatial_mamba, f"{self.written} must (be Float|have the dtype of)"),
        )
        for of, message in operators[: 1 if kernels == "eager" else 2]:
            with pytest.raises(ValueError, match=f"{self.name}: {message}"):
                getattr(of, self.name)(first.double(), *rest, *self.others)
            with pytest.raises(ValueError, match=f"{self.name}: {self.written} must .*2, 4, 5, 2"):
                getattr(of, self.name)(first[..., :2], *rest, *self.others)
