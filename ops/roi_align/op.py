"""``spatial_mamba::roi_align``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.roi_align import eager, reference

_NAME = "roi_align"


def _fake(x: Tensor, boxes: Tensor, height: int, width: int, *_: object) -> Tensor:
    return x.new_empty(len(boxes), height, width, x.shape[3])


_extension.define(
    _NAME,
    fake=_fake,
    eager=eager.roi_align,
    reference=reference.roi_align,
    eager_backward=eager.roi_align_backward,
    by_design=("cuda",),  # torchvision's kernel is fast there
)


def roi_align(
    x: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign of a channels-last map.

    The numbers of ``torchvision.ops.roi_align`` up to rounding: a box is divided into bins, whose
    values are the means of bilinear samples. He et al., "Mask R-CNN", arXiv 1703.06870.

    Args:
        x: ``Tensor[B, H, W, C]``; the compiled kernel copies it unless its channels are dense and
            its tokens evenly spaced.
        boxes: ``Tensor[N, 5]``: number of the image, left, top, right, bottom; best in float32. A
            box whose right is left of its left is empty. If a number is not finite or beyond
            1e9, the result is NaN.
        height, width: P and Q, the numbers of bins.
        scale: pixels of the map per unit of ``boxes``.
        sampling_ratio: samples along each side of a bin; 0: about one per pixel of the map.
        aligned: pixel centres are at halves, which "ROIAlignV2" of Detectron2 means.

    Returns:
        ``Tensor[N, P, Q, C]``, contiguous, in the dtype of ``x``; computed in float32 (float64 for
        float64 ``x``). Gradients of ``x`` do not depend on the number of threads; those of
        ``boxes`` are 0.

    Raises:
        ValueError: a shape, dtype or number does not fit.
    """
    check_activation(_NAME, "x", x, "B H W C")
    check_tensor(_NAME, "boxes", boxes, (boxes.shape[0] if boxes.dim() else 0, 5), "[N, 5]")
    for name, value in {"height": height, "width": width}.items():
        if value < 1:
            raise ValueError(f"{_NAME}: {name} must be at least 1, got {value}")
    numbers = boxes[:, 0]
    is_wrong = (numbers < 0) | (numbers >= len(x))
    if is_wrong.any():
        raise ValueError(
            f"{_NAME}: boxes must be of images 0 to {len(x) - 1}, got {numbers[is_wrong][0]:g}"
        )
    return torch.ops.spatial_mamba.roi_align(
        x, boxes, height, width, scale, sampling_ratio, aligned
    )
