"""Windows cover every pixel, overlap as required, and have weights that rise from inner edges."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_mamba_d2.prediction.windows import Grid


@pytest.mark.parametrize("size", [(1, 1), (40, 300), (64, 64), (65, 129), (500, 333), (96, 97)])
@pytest.mark.parametrize(("window", "overlap"), [(64, 1), (64, 16), (64, 32), (5, 2)])
def test_coverage_and_overlap(size, window, overlap):
    grid = Grid(size, window, overlap)
    covered = np.zeros(size, int)
    for place in grid:
        assert place.bottom <= size[0] and place.right <= size[1]
        assert place.size == (min(window, size[0]), min(window, size[1]))
        covered[place.slices] += 1
    assert covered.min() >= 1
    for starts in (grid.tops, grid.lefts):
        assert all(b - a <= window - overlap for a, b in zip(starts, starts[1:], strict=False))
        # Rows that are kept for blending: a window never meets the one after the next but one.
        assert all(d - a >= window for a, d in zip(starts, starts[3:], strict=False))


def test_weights():
    grid = Grid((100, 40), 64, 16)
    rows, columns = grid.ramps(grid[0])
    assert (columns == 1).all() and (rows[:48] == 1).all()
    assert (np.diff(rows[48:]) < 0).all() and rows.min() > 0
    assert np.array_equal(grid.ramps(grid[1])[0], rows[::-1])


@pytest.mark.parametrize(("window", "overlap"), [(3, 1), (64, 0), (64, 33)])
def test_sizes_out_of_range(window, overlap):
    with pytest.raises(ValueError, match=f"got {window if window < 4 else overlap}"):
        Grid((100, 100), window, overlap)
