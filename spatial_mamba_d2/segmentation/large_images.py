"""Predictions whose memory grows with the image, not with image x classes.

Scores of 150 classes for each pixel of a large image take gigabytes, and only the largest one is
wanted. So large images are handled class by class or in strips of rows, never as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.models.upernet import resize
from spatial_mamba_d2.segmentation.inference import (
    Model,
    Protocol,
    mirrored_views,
    segment,
    slide,
    whole,
    windows,
)

# Scores that are held at once: the buffers of images above this are split. Images of ADE20K's usual
# 512 x 683 with 150 classes are below it.
SCORES_BYTES = 2**28
STRIP_BYTES = 2**26


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
        model: in eval mode, of ``num_classes``, at most 255.
        views, size, protocol: see :func:`~.inference.segment`.

    Returns:
        ``uint8 Tensor[*size]``.
    """
    inputs = mirrored_views(views, protocol)
    height, width = size
    view_px = max(x.shape[-2] * x.shape[-1] for x in inputs)

    def fits(num_px: int) -> bool:
        return 4 * num_classes * num_px <= SCORES_BYTES

    if fits(max(height * width, view_px)):
        return segment(model, views, size, protocol).argmax(0).to(torch.uint8)
    if len(inputs) == 1 and (protocol.mode == "whole" or fits(view_px)):
        (x,) = inputs
        if protocol.mode == "slide":
            scores = slide(model, x, protocol.crop_px, protocol.stride_px)
        else:
            scores = model(x).float()
        return _argmax_by_class(scores, x.shape[-2:], (height, width))
    kind = _SlidingRows if protocol.mode == "slide" else _WholeRows
    sources = [
        kind(model, x, (height, width), protocol, protocol.flip and i % 2 == 1)
        for i, x in enumerate(inputs)
    ]
    return _argmax_by_rows(sources, (height, width), num_classes)


def _argmax_by_class(scores: Tensor, view: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Argmax of ``Tensor[1, K, h, w]``, resized to the view's size, then to ``size``."""
    step = max(1, SCORES_BYTES // (4 * size[0] * size[1]))
    best = label = None
    for first in range(0, scores.shape[1], step):
        part = resize(resize(scores[:, first : first + step], view), size)[0]
        value, index = part.max(0)
        index = index.to(torch.uint8) + first
        if best is None or label is None:
            best, label = value, index
        else:
            label = torch.where(value > best, index, label)
            torch.maximum(best, value, out=best)
    assert label is not None  # there is at least one class
    return label


def _argmax_by_rows(sources: Sequence[_Rows], size: tuple[int, int], num_classes: int) -> Tensor:
    """Argmax of the scores of one source, or of the mean probabilities of several."""
    height, width = size
    step = max(1, STRIP_BYTES // (4 * num_classes * width))
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
        strips.append(total.argmax(0).to(torch.uint8))
    return torch.cat(strips)


class _Rows:
    """Rows of a view's scores in the size of the image; they must be asked for from top to bottom.

    Args:
        model, x: what to run, and the view, ``Tensor[1, C, H_s, W_s]``.
        size: of the image.
        mirrored: whether the view is, so that the scores must be mirrored back.
    """

    def __init__(
        self, model: Model, x: Tensor, size: tuple[int, int], protocol: Protocol, mirrored: bool
    ):
        self.model, self.x, self.size, self.mirrored = model, x, size, mirrored
        self.protocol = protocol
        self.view: tuple[int, int] = (x.shape[-2], x.shape[-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """``float32 Tensor[K, stop - start, W]``."""
        low, high = _source_rows(self.view[0], self.size[0], start, stop)
        scores = self.view_rows(low, high)
        scores = scores.flip(-1) if self.mirrored else scores
        return _resize_rows(scores, low, self.view[0], self.size, start, stop)

    def view_rows(self, start: int, stop: int) -> Tensor:
        """Scores in the size of the view, ``float32 Tensor[K, stop - start, W_s]``."""
        raise NotImplementedError


class _WholeRows(_Rows):
    """Of a view that the model sees at once."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.scores = self.model(self.x)[0].float()

    def view_rows(self, start: int, stop: int) -> Tensor:
        height = self.scores.shape[1]
        low, high = _source_rows(height, self.view[0], start, stop)
        return _resize_rows(self.scores[:, low:high], low, height, self.view, start, stop)


class _SlidingRows(_Rows):
    """Of sliding windows: holds only rows to which windows may still be added, or not yet read."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        height, width = self.view
        crop_px, stride_px = self.protocol.crop_px, self.protocol.stride_px
        self.bands = list(windows(height, crop_px, stride_px))
        self.columns = list(windows(width, crop_px, stride_px))
        self.next_band = 0
        self.top = 0  # row of the view that is the first one in the buffer
        self.complete = 0  # rows of the view above this are final
        self.total: Tensor | None = None  # [K, rows, W_s]
        self.count = self.x.new_zeros(0, width)
        self.longest = 0  # number of rows that were asked for at once

    def view_rows(self, start: int, stop: int) -> Tensor:
        self.longest = max(self.longest, stop - start)
        while self.complete < stop:
            self._add_band(start)
        assert self.total is not None
        rows = slice(start - self.top, stop - self.top)
        return self.total[:, rows] / self.count[rows]

    def _add_band(self, needed: int) -> None:
        """The next windows from left to right; rows above ``needed`` are given up."""
        rows = self.bands[self.next_band]
        for columns in self.columns:
            scores = whole(self.model, self.x[..., rows, columns])[0]
            if columns is self.columns[0]:
                self._make_room(len(scores), min(needed, rows.start), rows.stop)
            assert self.total is not None
            place = slice(rows.start - self.top, rows.stop - self.top)
            self.total[:, place, columns] += scores
            self.count[place, columns] += 1
        self.next_band += 1
        last = self.next_band == len(self.bands)
        self.complete = rows.stop if last else self.bands[self.next_band].start

    def _make_room(self, num_classes: int, start: int, stop: int) -> None:
        """Let the buffer hold rows ``start`` to ``stop``, the new ones 0."""
        width = self.view[1]
        old, shift = self.total, start - self.top
        num_old = max(0, 0 if old is None else old.shape[1] - shift)
        if old is not None and old.shape[1] >= stop - start:  # in place, class by class
            for plane in (*old, self.count):
                plane[:num_old] = plane[shift:].clone()
                plane[num_old:] = 0
        else:  # as large as it will ever have to be
            num_rows = max(stop - start, self.protocol.crop_px + self.longest + 4)
            self.total = self.x.new_zeros(num_classes, num_rows, width, dtype=torch.float32)
            count = self.x.new_zeros(num_rows, width)
            if old is not None:
                self.total[:, :num_old] = old[:, shift:]
                count[:num_old] = self.count[shift:]
            self.count = count
        self.top = start


def _source_rows(source: int, height: int, start: int, stop: int) -> tuple[int, int]:
    """Which of ``source`` rows a resizing to ``height`` rows reads for rows start to stop."""
    if source == height:
        return start, stop
    first, _, _ = _neighbours(source, height, start, start + 1)
    _, last, _ = _neighbours(source, height, stop - 1, stop)
    return int(first[0]), int(last[0]) + 1


def _neighbours(source: int, height: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two rows that each row of a bilinear resizing lies between, and the second's weight."""
    rows = torch.arange(start, stop, dtype=torch.float32)
    position = ((rows + 0.5) * (source / height) - 0.5).clamp(min=0)
    first = position.long().clamp(max=source - 1)
    return first, (first + 1).clamp(max=source - 1), position - first


def _resize_rows(
    rows: Tensor, offset: int, source: int, size: tuple[int, int], start: int, stop: int
) -> Tensor:
    """Rows start to stop of a bilinear resizing to ``size``.

    Args:
        rows: ``Tensor[K, n, w]``, of ``source`` rows those from ``offset`` on.
    """
    height, width = size
    if rows.shape[2] != width:
        rows = F.interpolate(rows[None], (rows.shape[1], width), mode="bilinear")[0]
    if source == height:
        return rows
    first, second, weight = _neighbours(source, height, start, stop)
    weight = weight.to(rows)[:, None]
    first, second = (index.to(rows.device) - offset for index in (first, second))
    return rows[:, first] * (1 - weight) + rows[:, second] * weight
