"""RoIAlign written out: the mean of bilinear samples on a grid in each bin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise

#: Larger coordinates, which no image has, are treated as NaN.
MAX_COORDINATE = 1e9


def roi_align(
    x: Tensor, boxes: Tensor, height: int, width: int, scale: float, ratio: int, aligned: bool
) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.roi_align`."""
    x_, boxes = precise(x, boxes.detach())
    means = []
    for box in boxes:
        if not (box.abs() <= MAX_COORDINATE).all():
            means.append(x_.new_full((height, width, x.shape[3]), math.nan))
            continue
        left, top, right, bottom = (box[1:] * scale - (0.5 if aligned else 0)).tolist()
        right = max(right, left + (0 if aligned else 1))
        bottom = max(bottom, top + (0 if aligned else 1))
        across = _weights(left, right, x.shape[2], width, ratio, x_)
        down = _weights(top, bottom, x.shape[1], height, ratio, x_)
        means.append(torch.einsum("iy,jx,yxc->ijc", down, across, x_[int(box[0])]))
    if not means:
        return x_[:0, :1, :1].expand(0, height, width, -1).to(x.dtype).clone()
    return torch.stack(means).to(x.dtype)


def _weights(low: float, high: float, size: int, bins: int, ratio: int, like: Tensor) -> Tensor:
    """Of each of ``size`` pixels along an axis in the mean of each bin, ``Tensor[bins, size]``."""
    weights = like.new_zeros(bins, size)
    bin_size = (high - low) / bins
    samples = ratio if ratio > 0 else math.ceil(bin_size)
    for i in range(bins):
        for s in range(samples):
            at = low + i * bin_size + (s + 0.5) * bin_size / samples
            if -1 <= at <= size:  # samples further outside are 0
                at = max(at, 0)
                below = min(int(at), size - 1)
                above = min(below + 1, size - 1)
                share = at - below if above > below else 0.0
                weights[i, below] += (1 - share) / samples
                weights[i, above] += share / samples
    return weights
