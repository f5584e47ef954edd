"""Label maps of windows become the label map of the image, a strip of rows at a time.

Where windows overlap, their probabilities are averaged with the weights of :meth:`.Grid.ramps`,
and the class with the highest mean is taken. What a window sees alone is its own class; so of a
window only its label map and the probabilities in its margins are kept, as float16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index, index_dtype
from spatial_mamba_d2.prediction.windows import Grid

_CACHED_WINDOWS = 8  # of two rows, around the place where the strip is written


class _Span(NamedTuple):
    """Rows, or columns, of the image that the same rows, or columns, of windows cover."""

    start: int
    stop: int
    covering: tuple[int, ...]


class WindowLabels(NamedTuple):
    """What is kept of a window.

    Attributes:
        label: class indices ``[h, w]``.
        shared: probabilities in the parts that other windows cover too, ``float16[N]``.
    """

    label: np.ndarray
    shared: np.ndarray


class Blender:
    """Blends the windows of a grid; ``probabilities`` -> :class:`WindowLabels` -> strips of rows.

    Args:
        num_classes: of the probabilities.
    """

    def __init__(self, grid: Grid, num_classes: int):
        self.grid, self.num_classes = grid, num_classes
        self.dtype = index_dtype(num_classes)
        self.rows = _spans(grid.tops, grid.window_px, grid.size[0])
        self.columns = _spans(grid.lefts, grid.window_px, grid.size[1])

    @cached_property
    def _places(self) -> dict[tuple[int, int, int], slice]:
        """(window, start of rows, start of columns) -> where the part is in ``shared``."""
        ends = [0] * len(self.grid)
        places = {}
        for rows in self.rows:
            for columns in self.columns:
                windows = self._covering(rows, columns)
                size = (rows.stop - rows.start) * (columns.stop - columns.start) * self.num_classes
                for index in windows if len(windows) > 1 else ():
                    places[index, rows.start, columns.start] = slice(
                        ends[index], ends[index] + size
                    )
                    ends[index] += size
        return places

    def _covering(self, rows: _Span, columns: _Span) -> list[int]:
        width = len(self.grid.lefts)
        return [row * width + column for row in rows.covering for column in columns.covering]

    def pack(self, index: int, probabilities: np.ndarray) -> WindowLabels:
        """What to keep of a window.

        Args:
            index: of the window.
            probabilities: ``float32[K, h, w]``.
        """
        window = self.grid[index]
        parts = [np.zeros(0, np.float16)]
        for rows in self.rows:
            for columns in self.columns:
                if (index, rows.start, columns.start) in self._places:
                    y = slice(rows.start - window.top, rows.stop - window.top)
                    x = slice(columns.start - window.left, columns.stop - window.left)
                    parts.append(probabilities[:, y, x].astype(np.float16).ravel())
        label = probabilities.argmax(axis=0).astype(self.dtype)
        return WindowLabels(label, np.concatenate(parts))

    def strips(
        self, load: Callable[[int], WindowLabels | None]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """First row and classes of one strip after the other, ``[h, W]``.

        Args:
            load: the window of an index, or None if it has no result: where no window has one, the
                class is :func:`~.class_indices.ignore_index`. A window is asked for several times.
        """
        cache: dict[int, WindowLabels | None] = {}

        def cached(index: int) -> WindowLabels | None:
            if index not in cache:
                while len(cache) >= _CACHED_WINDOWS:
                    del cache[next(iter(cache))]
                cache[index] = load(index)
            return cache[index]

        for rows in self.rows:
            shape = rows.stop - rows.start, self.grid.size[1]
            strip = np.full(shape, ignore_index(self.num_classes), self.dtype)
            for columns in self.columns:
                indices = self._covering(rows, columns)
                found = {i: w for i in indices if (w := cached(i)) is not None}
                if found:
                    part = self._part(rows, columns, found, is_shared=len(indices) > 1)
                    strip[:, columns.start : columns.stop] = part
            yield rows.start, strip

    def _part(
        self, rows: _Span, columns: _Span, found: Mapping[int, WindowLabels], *, is_shared: bool
    ) -> np.ndarray:
        shape = rows.stop - rows.start, columns.stop - columns.start
        total = np.zeros((self.num_classes, *shape), np.float32)
        for index, content in found.items():
            window = self.grid[index]
            y = slice(rows.start - window.top, rows.stop - window.top)
            x = slice(columns.start - window.left, columns.stop - window.left)
            if not is_shared:
                return content.label[y, x]
            place = self._places[index, rows.start, columns.start]
            values = content.shared[place].reshape(self.num_classes, *shape)
            of_rows, of_columns = self.grid.ramps(window)
            total += values.astype(np.float32) * (of_rows[y, None] * of_columns[None, x])
        return total.argmax(axis=0).astype(self.dtype)


def _spans(starts: list[int], window_px: int, side: int) -> list[_Span]:
    stops = [min(start + window_px, side) for start in starts]
    edges = sorted({*starts, *stops})
    return [
        _Span(
            start,
            stop,
            tuple(i for i, (a, b) in enumerate(zip(starts, stops, strict=True)) if a <= start < b),
        )
        for start, stop in zip(edges[:-1], edges[1:], strict=True)
    ]
