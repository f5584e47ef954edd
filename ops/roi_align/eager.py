"""RoIAlign box by box: the pixels of a box, times the weights of its columns and rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise
from spatial_mamba_d2.ops.roi_align.reference import MAX_COORDINATE

_Placed = tuple[int, Tensor, slice, Tensor, slice]


def roi_align(
    x: Tensor, boxes: Tensor, height: int, width: int, scale: float, ratio: int, aligned: bool
) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.roi_align`."""
    x_, boxes = precise(x, boxes.detach())
    means = []
    for placed in _place(boxes, x.shape, height, width, scale, ratio, aligned):
        if placed is None:
            means.append(x_.new_full((height, width, x.shape[3]), math.nan))
            continue
        image, across, columns, down, rows = placed
        of_rows = torch.matmul(across, x_[image, rows, columns])  # [h, Q, C]
        means.append(torch.mm(down, of_rows.flatten(1)).view(height, width, -1))
    if not means:
        return x_[:0, :1, :1].expand(0, height, width, -1).to(x.dtype).clone()
    return torch.stack(means).to(x.dtype)


def roi_align_backward(
    grad_output: Tensor,
    x: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    scale: float,
    ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, boxes; the latter are 0."""
    grad, boxes_ = precise(grad_output, boxes)
    grad_x = grad.new_zeros(x.shape)
    placed_boxes = _place(boxes_, x.shape, height, width, scale, ratio, aligned)
    for grad_mean, placed in zip(grad, placed_boxes, strict=True):
        if placed is not None:
            image, across, columns, down, rows = placed
            of_rows = torch.mm(down.t(), grad_mean.flatten(1)).view(-1, *grad_mean.shape[1:])
            grad_x[image, rows, columns] += torch.matmul(across.t(), of_rows)
    return grad_x.to(x.dtype), torch.zeros_like(boxes)


def _place(
    boxes: Tensor,
    shape: torch.Size,
    height: int,
    width: int,
    scale: float,
    ratio: int,
    aligned: bool,
) -> Iterator[_Placed | None]:
    """Each box's image, and weights and pixels along both axes; None if a number is not valid."""
    corners = boxes[:, 1:] * scale - (0.5 if aligned else 0)
    sides = (corners[:, 2:] - corners[:, :2]).clamp(min=0 if aligned else 1)
    is_valid = (boxes.abs() <= MAX_COORDINATE).all(dim=1).tolist()
    images = boxes[:, 0].nan_to_num().long().tolist()
    for i, image in enumerate(images):
        if is_valid[i]:
            across, columns = _weights(corners[i, 0], sides[i, 0], shape[2], width, ratio)
            down, rows = _weights(corners[i, 1], sides[i, 1], shape[1], height, ratio)
            yield image, across, columns, down, rows
        else:
            yield None


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
