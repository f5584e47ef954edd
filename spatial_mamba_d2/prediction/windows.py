"""Windows that cover an image, and where they overlap."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """A rectangle of an image, in pixels; bottom and right are outside of it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def shared_with(self, other: Window) -> Window | None:
        """The rectangle that both have; None if there is none."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Window(top, left, bottom, right) if top < bottom and left < right else None


class Grid:
    """Square windows over an image, at equal distances, in rows from the top left.

    Args:
        size: height and width of the image.
        window_px: side of the windows; an image that is narrower has narrower windows.
        overlap_px: what neighbours share at least, in each direction; by default a quarter of the
            window. It must exceed the uncertain edge of a prediction, and objects that are not
            larger than it are complete in at least one window.

    Raises:
        ValueError: a side is below 1, or the overlap is not in 1 .. window_px / 2.
    """

    def __init__(self, size: tuple[int, int], window_px: int, overlap_px: int | None = None):
        check_window(window_px, overlap_px)
        self.size = size
        self.window_px = window_px
        self.overlap_px = window_px // 4 if overlap_px is None else overlap_px
        self.tops = _starts(size[0], window_px, self.overlap_px)
        self.lefts = _starts(size[1], window_px, self.overlap_px)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, column = divmod(index, len(self.lefts))
        top, left = self.tops[row], self.lefts[column]
        bottom = min(top + self.window_px, self.size[0])
        return Window(top, left, bottom, min(left + self.window_px, self.size[1]))

    def __iter__(self) -> Iterator[Window]:
        return (self[i] for i in range(len(self)))

    def row_of(self, index: int) -> int:
        return index // len(self.lefts)

    def indices_of_row(self, row: int) -> range:
        """The windows of a row."""
        return range(row * len(self.lefts), (row + 1) * len(self.lefts))

    def windows_with(self, box: Sequence[float], margin_px: float) -> list[int]:
        """The windows that hold a box, x1, y1, x2, y2, complete.

        Args:
            margin_px: how far from edges that are inside of the image it has to be.
        """
        x1, y1, x2, y2 = box
        height, width = self.size
        rows = _holding(self.tops, self.window_px, height, y1, y2, margin_px)
        columns = _holding(self.lefts, self.window_px, width, x1, x2, margin_px)
        return [row * len(self.lefts) + column for row in rows for column in columns]

    def inner_edges(self, window: Window) -> tuple[bool, bool, bool, bool]:
        """Whether its top, left, bottom and right edge are inside of the image."""
        height, width = self.size
        return window.top > 0, window.left > 0, window.bottom < height, window.right < width

    def ramps(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """The window function: weights of rows, ``float32[h]``, and of columns, ``float32[w]``.

        They rise linearly over the overlap, from each edge that is inside of the image.
        """
        top, left, bottom, right = self.inner_edges(window)
        height, width = window.size
        return self._ramp(height, top, bottom), self._ramp(width, left, right)

    def _ramp(self, length: int, rises: bool, falls: bool) -> np.ndarray:
        distance = np.arange(length, dtype=np.float32) + 0.5  # from the edge
        weights = np.ones(length, np.float32)
        if rises:
            weights = np.minimum(weights, distance / self.overlap_px)
        if falls:
            weights = np.minimum(weights, distance[::-1] / self.overlap_px)
        return weights


def _holding(
    starts: list[int], window_px: int, side: int, low: float, high: float, margin_px: float
) -> list[int]:
    """Which of the windows along one direction have ``low`` to ``high``, and a margin, inside."""
    last = bisect_right(starts, low)
    first = bisect_left(starts, high - window_px)
    return [
        i
        for i in range(first, last)
        if (i == 0 or starts[i] + margin_px <= low)
        and (starts[i] + window_px >= side or high <= starts[i] + window_px - margin_px)
    ]


def check_window(window_px: int, overlap_px: int | None) -> None:
    """Raises ValueError for what :class:`Grid` refuses."""
    if window_px < 4:
        raise ValueError(f"window_px (--window) must be at least 4, got {window_px}")
    if overlap_px is not None and not 1 <= overlap_px <= window_px // 2:
        raise ValueError(
            f"overlap_px (--overlap) must be in 1 .. {window_px // 2}, at most half of the "
            f"window, got {overlap_px}"
        )


def _starts(side: int, window_px: int, overlap_px: int) -> list[int]:
    if side < 1:
        raise ValueError(f"size must be at least 1 x 1, got a side of {side}")
    if side <= window_px:
        return [0]
    number = -(-(side - overlap_px) // (window_px - overlap_px))
    return [round(i * (side - window_px) / (number - 1)) for i in range(number)]
