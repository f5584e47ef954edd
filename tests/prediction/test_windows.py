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


def test_windows_that_hold_a_box():
    grid = Grid((100, 260), 100, 20)  # columns 0 to 100, 80 to 180, 160 to 260
    assert grid.lefts == [0, 80, 160]
    assert grid.windows_with((0, 0, 100, 100), 0) == [0]
    assert grid.windows_with((82, 5, 98, 20), 2) == [0, 1]
    assert grid.windows_with((81, 5, 98, 20), 2) == [0]
    assert grid.windows_with((82, 5, 99, 20), 2) == [1]
    assert grid.windows_with((90, 5, 170, 20), 2) == [1]
    assert grid.windows_with((70, 5, 190, 20), 0) == []
    assert grid.windows_with((200, 0, 260, 100), 2) == [2]  # the edges of the image cut nothing
    for box in np.random.default_rng(0).uniform(0, 260, (50, 2)):
        low, high = sorted(box)
        expected = [
            i for i, window in enumerate(grid)
            if (i == 0 or window.left + 3 <= low) and (i == 2 or high <= window.right - 3)
        ]  # fmt: skip
        assert grid.windows_with((low, 1, high, 2), 3) == expected


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
