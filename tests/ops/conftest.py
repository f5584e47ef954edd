"""Random inputs of the operators, and how far kernels may deviate from the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

#: largest error divided by the largest reference value, for inputs rounded to the dtype
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}
#: gradients are sums over many tokens, in which rounding errors accumulate
GRADIENT_TOLERANCE = {**TOLERANCE, torch.float64: 1e-11, torch.float32: 1e-5}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference divided by the largest expected value; NaN if ``actual`` has one."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    difference = (actual - expected).abs().max()
    return (difference / expected.abs().max().clamp(min=1e-30)).item()


pytest.register_assert_rewrite("tests.ops.inference_suite", "tests.ops.written_gradient_suite")


@pytest.fixture
def device() -> torch.device:
    """The device of the inputs; a test module may choose another one."""
    return torch.device("cpu")


@pytest.fixture
def ssm_inputs(device) -> Callable[..., list[Tensor]]:
    """``ssm_inputs(B, H, W, D, dtype)``: u, delta, A, B, C, D, delta_bias, taps.

    Steps cover the linear branch of softplus and very small values.
    """

    def make(
        batch: int, height: int, width: int, dim: int, dtype: torch.dtype = torch.float32
    ) -> list[Tensor]:
        g = torch.Generator().manual_seed(batch * 1000 + height * 100 + width * 10 + dim)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        delta = 2 * randn(batch, height, width, dim)
        delta.flatten()[::7] += 25
        delta.flatten()[::11] -= 12
        inputs = [
            randn(batch, height, width, dim),
            delta,
            -torch.exp(0.5 * randn(dim)),
            randn(batch, height, width),
            randn(batch, height, width),
            randn(dim),
            randn(dim) - 1,
            0.2 * randn(25, dim),
        ]
        return [x.to(device, dtype) for x in inputs]

    return make


@pytest.fixture
def strided() -> Callable[[Tensor], Tensor]:
    """The same values in memory that is not contiguous along any axis, with NaN in between."""

    def make(x: Tensor) -> Tensor:
        storage = x.new_full([2 * n + 1 for n in x.shape], float("nan"))
        view = storage[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)

    return make
