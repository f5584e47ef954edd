"""What the tests of two counters share."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def pointwise_gflops() -> Callable[[int], float]:
    """Work of the 1x1 convolutions of an image of 224 x 224, from the backbone's ``embed_dim``.

    The authors' counter has them among the convolutions; ours are matrix products.
    """

    def count(dim: int) -> float:
        in_stem = 56**2 * 4 * dim * dim
        in_a_downsampling = 56**2 * dim * 8 * dim + 28**2 * 8 * dim * 2 * dim
        return (in_stem + 3 * in_a_downsampling) / 1e9

    return count
