"""Predictions whose memory grows with the image, not with image x classes.

Scores of 150 classes for each pixel of a large image take gigabytes, and only the largest one is
wanted. So large images are handled class by class, in strips of rows and in slabs of columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spatial_mamba_d2.models.upernet import SCORES_BYTES, argmax, resize, resized_argmax
from spatial_mamba_d2.segmentation.inference import (
    Model,
    Protocol,
    model_inputs,
    segment,
    slide,
    windows,
)

STRIP_BYTES = 2**26
WINDOWS_BYTES = 2**30  # of the sums over sliding windows, for all views together


@torch.no_grad()
def predict(
    model: Model,
    views: Sequence[Tensor],
    size: Sequence[int],
    protocol: Protocol,
    num_classes: int,
) -> Tensor:
    """The class of each pixel: the argmax of :func:`~.inference.segment`.

    From a single view exactly that, except from sliding windows over a large view that is then
    resized; that, and the average of several views, has rounding errors of its own.

    Args:
        model: in eval mode, of ``num_classes``.
        views, size, protocol: see :func:`~.inference.segment`.

    Returns:
        class indices ``Tensor[*size]``, see :func:`~.class_indices.as_label_tensor`.
    """
    inputs = model_inputs([x[None] for x in views], protocol)
    height, width = size
    view_px = max(x.shape[-2] * x.shape[-1] for x, _ in inputs)

    def fits(num_px: int) -> bool:
        return 4 * num_classes * num_px <= SCORES_BYTES

    if fits(max(height * width, view_px)):
        return argmax(segment(model, views, size, protocol))
    if len(inputs) == 1 and (protocol.mode == "whole" or fits(view_px)):
        ((x, _),) = inputs
        if protocol.mode == "slide":
            scores = slide(model, x, protocol.crop_px, protocol.stride_px)
        else:
            scores = model(x).float()
        return resized_argmax(scores, (x.shape[-2:], (height, width)), SCORES_BYTES)
    if protocol.mode == "whole":
        whole_views = [_WholeRows(model, x, (height, width), flipped) for x, flipped in inputs]
        return _argmax_by_rows(whole_views, height, slice(0, width), num_classes)
    # The wider a slab, the fewer windows belong to two of them.
    column_bytes = sum(
        4 * num_classes * min(2 * protocol.crop_px, x.shape[-2]) * x.shape[-1] / width
        for x, _ in inputs
    )
    num_slabs = min(width, math.ceil(column_bytes * width / WINDOWS_BYTES))
    labels = []
    for i in range(num_slabs):
        columns = slice(width * i // num_slabs, width * (i + 1) // num_slabs)
        sources = [
            _SlidingRows(model, x, (height, width), flipped, columns, protocol)
            for x, flipped in inputs
        ]
        labels.append(_argmax_by_rows(sources, height, columns, num_classes))
    return torch.cat(labels, 1)


def _argmax_by_rows(
    sources: Sequence[_Rows], height: int, columns: slice, num_classes: int
) -> Tensor:
    """Argmax of the scores of one source, or of the mean probabilities of several."""
    step = max(1, STRIP_BYTES // (4 * num_classes * (columns.stop - columns.start)))
    strips = []
    for start in range(0, height, step):
        stop = min(start + step, height)
        total: Tensor | None = None
        for source in sources:
            scores = source.rows(start, stop)
            if len(sources) > 1:
                scores = scores.softmax(0)
            total = scores if total is None else total.add_(scores)
        assert total is not None
        strips.append(argmax(total))
    return torch.cat(strips)


class _Rows:
    """Rows of a view's scores in the size of the image; they must be asked for from top to bottom.

    Args:
        x: the view, ``Tensor[1, C, H_s, W_s]``.
        size: H, W of the image.
        flipped: whether the model sees the view's mirror image; its scores are mirrored back.
        columns: of the image, those that are wanted; None: all.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        size: tuple[int, int],
        flipped: bool,
        columns: slice | None = None,
    ):
        self.model, self.x, self.size, self.flipped = model, x, size, flipped
        self.view: tuple[int, int] = (x.shape[-2], x.shape[-1])
        self.columns = columns or slice(0, size[1])
        # The columns of the view that these are computed from
        self.view_columns = _source_range(self.view[1], size[1], self.columns)

    def rows(self, start: int, stop: int) -> Tensor:
        """``float32 Tensor[K, stop - start, number of columns]``."""
        rows = slice(start, stop)
        view_rows = _source_range(self.view[0], self.size[0], rows)
        scores = self.view_rows(view_rows.start, view_rows.stop)
        scores = _resize(scores, 2, self.view_columns, self.view[1], self.size[1], self.columns)
        return _resize(scores, 1, view_rows, self.view[0], self.size[0], rows)

    def view_rows(self, start: int, stop: int) -> Tensor:
        """``float32 Tensor[K, stop - start, n]``: the view's scores at its n ``view_columns``."""
        raise NotImplementedError

    def run(self, x: Tensor) -> Tensor:
        """The model's scores of a part of the view, ``float32 Tensor[K, h, w]``."""
        scores = self.model(x.flip(-1) if self.flipped else x)[0].float()
        return scores.flip(-1) if self.flipped else scores


class _WholeRows(_Rows):
    """Of a view that the model sees at once."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.scores = self.run(self.x)

    def view_rows(self, start: int, stop: int) -> Tensor:
        (height, width), rows = self.scores.shape[1:], slice(start, stop)
        read = _source_range(height, self.view[0], rows)
        read_columns = _source_range(width, self.view[1], self.view_columns)
        scores = self.scores[:, read, read_columns]
        scores = _resize(scores, 2, read_columns, width, self.view[1], self.view_columns)
        return _resize(scores, 1, read, height, self.view[0], rows)


class _SlidingRows(_Rows):
    """Of sliding windows: holds only rows to which windows may still be added, or not yet read."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        size: tuple[int, int],
        flipped: bool,
        columns: slice,
        protocol: Protocol,
    ):
        super().__init__(model, x, size, flipped, columns)
        height, width = self.view
        self.crop_px = protocol.crop_px
        self.bands = list(windows(height, self.crop_px, protocol.stride_px))
        across = list(windows(width, self.crop_px, protocol.stride_px))
        if flipped:
            across = [slice(width - w.stop, width - w.start) for w in across]
        low, high = self.view_columns.start, self.view_columns.stop
        self.across = [w for w in across if w.start < high and w.stop > low]
        self.next_band = 0
        self.top = 0  # row of the view that is the first one in the buffer
        self.complete = 0  # rows of the view above this are final
        self.total: Tensor | None = None  # [K, rows, number of view_columns]
        self.count = self.x.new_zeros(0, high - low)
        self.longest = 0  # number of rows that were asked for at once

    def view_rows(self, start: int, stop: int) -> Tensor:
        self.longest = max(self.longest, stop - start)
        while self.complete < stop:
            self._add_band(start)
        assert self.total is not None
        rows = slice(start - self.top, stop - self.top)
        return self.total[:, rows] / self.count[rows]

    def _add_band(self, needed: int) -> None:
        """The next windows across the view; rows above ``needed`` are given up."""
        rows = self.bands[self.next_band]
        low, high = self.view_columns.start, self.view_columns.stop
        for i, window in enumerate(self.across):
            part = self.x[..., rows, window]
            scores = resize(self.run(part)[None], part.shape[-2:])[0]
            if i == 0:
                self._make_room(len(scores), min(needed, rows.start), rows.stop)
            assert self.total is not None
            place = slice(rows.start - self.top, rows.stop - self.top)
            start, stop = max(window.start, low), min(window.stop, high)
            columns = slice(start - low, stop - low)
            self.total[:, place, columns] += scores[..., start - window.start : stop - window.start]
            self.count[place, columns] += 1
        self.next_band += 1
        last = self.next_band == len(self.bands)
        self.complete = rows.stop if last else self.bands[self.next_band].start

    def _make_room(self, num_classes: int, start: int, stop: int) -> None:
        """Let the buffer hold rows ``start`` to ``stop``, the new ones 0."""
        width = self.count.shape[1]
        old, shift = self.total, start - self.top
        num_old = max(0, 0 if old is None else old.shape[1] - shift)
        if old is not None and old.shape[1] >= stop - start:  # in place, class by class
            for plane in (*old, self.count):
                plane[:num_old] = plane[shift:].clone()
                plane[num_old:] = 0
        else:  # as large as it will ever have to be
            num_rows = max(stop - start, self.crop_px + self.longest + 4)
            self.total = self.x.new_zeros(num_classes, num_rows, width, dtype=torch.float32)
            count = self.x.new_zeros(num_rows, width)
            if old is not None:
                self.total[:, :num_old] = old[:, shift:]
                count[:num_old] = self.count[shift:]
            self.count = count
        self.top = start


def _source_range(source: int, target: int, wanted: slice) -> slice:
    """Which of ``source`` rows a resizing to ``target`` rows reads for those that are wanted."""
    if source == target:
        return wanted
    first, _, _ = _neighbours(source, target, wanted.start, wanted.start + 1)
    _, last, _ = _neighbours(source, target, wanted.stop - 1, wanted.stop)
    return slice(int(first[0]), int(last[0]) + 1)


def _neighbours(source: int, target: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two rows that each row of a bilinear resizing lies between, and the second's weight."""
    rows = torch.arange(start, stop, dtype=torch.float32)
    position = ((rows + 0.5) * (source / target) - 0.5).clamp(min=0)
    first = position.long().clamp(max=source - 1)
    return first, (first + 1).clamp(max=source - 1), position - first


def _resize(
    scores: Tensor, dim: int, read: slice, source: int, target: int, wanted: slice
) -> Tensor:
    """A part of a linear resizing along one dimension, from ``source`` to ``target``.

    Args:
        scores: of the source those at ``read``, see :func:`_source_range`.
    """
    if source == target:
        return scores
    first, second, weight = _neighbours(source, target, wanted.start, wanted.stop)
    first, second = ((index - read.start).to(scores.device) for index in (first, second))
    shape = [1] * scores.dim()
    shape[dim] = -1
    return torch.lerp(
        scores.index_select(dim, first),
        scores.index_select(dim, second),
        weight.to(scores).view(shape),
    )
