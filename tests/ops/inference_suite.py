"""What holds for every operator without gradients, which the conformance suite does not fit.

A test module subclasses :class:`InferenceSuite`, whose tests then run for its operator.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension

from . import emulator
from .conftest import TOLERANCE, relative_error

SHAPES = [(1, 1, 1, 3), (2, 1, 7, 5), (1, 9, 1, 16), (2, 5, 6, 17), (3, 4, 13, 64), (1, 11, 3, 131)]


class InferenceSuite:
    """Against the reference, in all dtypes, with odd, tiny, strided and empty inputs."""

    name: str  # of the function and the schema
    reference: ModuleType
    others: tuple = ()  # the arguments after the tensors
    num_sums = 0  # of the outputs, which are maps; those at the end are sums over tokens

    @pytest.fixture(params=["eager", "native", "emulated CUDA"], autouse=True)
    def kernels(self, request):
        """The kernels that run: plain PyTorch, then compiled kernels of each kind."""
        if request.param == "native" and _extension.WHY_NOT_COMPILED:
            pytest.skip(f"no compiled kernels: {_extension.WHY_NOT_COMPILED}")
        has_cpu_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(
            f"spatial_mamba::{self.name}", "CPU"
        )
        if request.param == "native" and not has_cpu_kernel:
            pytest.skip("no CPU kernels by design: those of other operators run on CPUs")
        if request.param == "emulated CUDA" and self.name not in emulator.OPERATORS:
            pytest.skip("no CUDA kernels by design: those of other operators run on GPUs")
        contexts = {
            "eager": _extension.without_compiled_kernels,
            "emulated CUDA": emulator.emulated_cuda,
        }
        with contexts.get(request.param, nullcontext)():
            yield request.param

    @staticmethod
    def arguments(*ssm_inputs: Tensor) -> list[Tensor]:
        """The operator's tensors, from those of ``structure_aware_ssm``."""
        raise NotImplementedError

    @pytest.fixture
    def inputs(self, ssm_inputs) -> Callable[..., list[Tensor]]:
        """``inputs(B, H, W, D, dtype)``: the operator's tensors."""

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
            return [x.to(dtype) for x in self.arguments(*ssm_inputs(*shape, torch.float64))]

        return make

    @staticmethod
    def tolerances(dtype: torch.dtype) -> tuple[float, ...]:
        """Of the outputs' errors; an output without one has a test of its own."""
        return (TOLERANCE[dtype],)

    def maps(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs that are not sums over tokens."""
        return outputs[: len(outputs) - self.num_sums]

    def call(self, tensors, of=ops) -> tuple[Tensor, ...]:
        """The outputs; of an operator in place, its result on a copy with the same strides."""
        first, *rest = tensors
        if self.name.endswith("_"):
            result = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype)
            getattr(of, self.name)(result.copy_(first), *rest, *self.others)
            return (result,)
        result = getattr(of, self.name)(first, *rest, *self.others)
        return result if isinstance(result, tuple) else (result,)

    def sums_like(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors of the shapes and dtypes of the sums: by default [D], of at least 32 bits."""
        x = tensors[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return [x.new_empty(x.shape[-1], dtype=dtype)] * self.num_sums

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_the_reference(self, shape, dtype, inputs):
        tensors = inputs(*shape, dtype=dtype)
        outputs = self.call(tensors)
        expected = self.call([x.double() for x in tensors], self.reference)
        for number, tolerance in enumerate(self.tolerances(dtype)):
            assert relative_error(outputs[number], expected[number]) <= tolerance, number
        maps = self.maps(outputs)
        for output in maps:
            assert output.shape == shape and output.dtype == dtype and output.is_contiguous()
        for output, like in zip(outputs[len(maps) :], self.sums_like(tensors), strict=True):
            assert output.shape == like.shape and output.dtype == like.dtype

    def test_strided_inputs(self, inputs, strided):
        tensors = inputs(2, 6, 9, 5)
        for actual, expected in zip(
            self.call(map(strided, tensors)), self.call(tensors), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    def test_every_value_is_written(self, inputs, monkeypatch):
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            outputs = self.call(inputs(2, 7, 13, 21))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(x.isfinite().all() for x in outputs)

    @pytest.mark.parametrize("shape", [(2, 9, 14, 40), (1, 9, 14, 16)], ids=str)
    def test_number_of_threads_changes_nothing(self, shape, inputs, kernels):
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(self.call(inputs(*shape)))
        finally:
            torch.set_num_threads(before)
        tolerance = 1e-5 if kernels == "eager" else 0
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert relative_error(b, a) <= tolerance

    def test_opcheck(self, inputs):
        op = getattr(torch.ops.spatial_mamba, self.name).default
        torch.library.opcheck(
            op, (*inputs(2, 4, 5, 3), *self.others), test_utils=("test_schema", "test_faketensor")
        )

    def test_empty_batch(self, inputs):
        tensors = [x[:0] if x.dim() > 2 and len(x) == 1 else x for x in inputs(1, 3, 4, 2)]
        outputs = self.call(tensors)
        maps = self.maps(outputs)
        assert all(output.shape == (0, 3, 4, 2) for output in maps)
        for output, like in zip(outputs[len(maps) :], self.sums_like(tensors), strict=True):
            assert torch.equal(output, torch.zeros_like(like))

    @pytest.mark.parametrize("of", [ops, torch.ops.spatial_mamba], ids=["function", "operator"])
    def test_gradients_are_refused(self, of, inputs):
        """By the schema's operator as well, which the function's checks do not protect."""
        tensors = inputs(1, 3, 4, 5)
        tensors[1].requires_grad_()
        with pytest.raises(RuntimeError, match=f"{self.name} has no gradients"):
            self.call(tensors, of)[-1].sum().backward()
        with torch.no_grad():
            assert not any(output.requires_grad for output in self.call(tensors, of))

    def test_other_derivatives_are_refused(self, inputs):
        first, *rest = (x.detach() for x in inputs(1, 3, 4, 5))
        message = f"{self.name} has no gradients"
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            self.call([forward_ad.make_dual(first, torch.ones_like(first)), *rest])
        second, *others = rest
        for transform, x in (
            (torch.func.grad, second),
            (torch.func.vmap, torch.stack((second, second))),
        ):
            with pytest.raises(RuntimeError, match=message):
                transform(lambda x: self.call([first, x, *others])[-1].sum())(x)

    def refuses(self, tensors, index, shape, message):
        """Assert that the tensor at ``index`` is named if it has another shape."""
        tensors[index] = torch.ones(shape)
        with pytest.raises(ValueError, match=message):
            self.call(tensors)
