"""RoIAlign box by box: the pixels of a box, times the weights of its columns and rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise


def roi_align(
    x: Tensor, boxes: Tensor, height: int, width: int, scale: float, ratio: int, aligned: bool
) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.roi_align`."""
    x_, boxes = precise(x, boxes)
    out = x_.new_full((len(boxes), height, width, x.shape[3]), math.nan)
    corners = boxes[:, 1:] * scale - (0.5 if aligned else 0)
    sides = (corners[:, 2:] - corners[:, :2]).clamp(min=0 if aligned else 1)
    is_finite = boxes.isfinite().all(dim=1).tolist()
    images = boxes[:, 0].nan_to_num().long().tolist()
    for i, image in enumerate(images):
        if not is_finite[i]:
            continue
        across, columns = _weights(corners[i, 0], sides[i, 0], x.shape[2], width, ratio)
        down, rows = _weights(corners[i, 1], sides[i, 1], x.shape[1], height, ratio)
        pixels = x_[image, rows, columns]  # [h, w, C]
        means = torch.matmul(across, pixels)  # [h, Q, C]
        torch.mm(down, means.flatten(1), out=out[i].view(height, -1))
    return out.to(x.dtype)


def _weights(low: Tensor, side: Tensor, size: int, bins: int, ratio: int) -> tuple[Tensor, slice]:
    """Weights ``Tensor[bins, n]`` of n pixels along an axis, and which pixels these are."""
    bin_size = side / bins
    samples = ratio if ratio > 0 else math.ceil(bin_size)
    number = torch.arange(max(samples, bins), dtype=low.dtype, device=low.device)
    steps = (number[:samples] + 0.5) * bin_size / max(samples, 1)
    at = low + number[:bins, None] * bin_size + steps
    is_inside = (at >= -1) & (at <= size)  # samples further outside are 0
    at = at.clamp(0, size - 1)
    below = at.long()
    above = (below + 1).clamp(max=size - 1)
    first, last = (int(below.min()), int(above.max())) if samples else (0, 0)
    share, portion = at - below, is_inside.to(low.dtype) / max(samples, 1)
    weights = low.new_zeros(bins, last - first + 1)
    weights.scatter_add_(1, below - first, (1 - share) * portion)
    weights.scatter_add_(1, above - first, share * portion)
    return weights, slice(first, last + 1)
