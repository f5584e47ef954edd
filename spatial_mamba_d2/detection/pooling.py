"""Detectron2's RoIAlign poolers with the kernels of this package on CPUs.

torchvision's backward kernel is single-threaded there and scatters each sample's gradient plane by
plane.
"""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import Tensor, nn

from spatial_mamba_d2.models.layers import nchw, nhwc
from spatial_mamba_d2.models.packed import is_on_cpu
from spatial_mamba_d2.ops import _extension, roi_align


class FastPooler(ROIPooler):
    """:class:`ROIPooler` whose levels are all RoIAlign; boxes keep float32 under autocast."""

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        if not is_on_cpu(x[0]):
            return super().forward(x, box_lists)
        return self.pool(x, box_lists).contiguous()  # heads may use Tensor.view

    def pool(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """The same on a CPU, channels-last in memory."""
        if len(box_lists) != len(x[0]):
            raise ValueError(
                f"box_lists must have one list per image, {len(x[0])}, got {len(box_lists)}"
            )
        height, width = self.output_size
        if not box_lists:
            return x[0].new_zeros(0, x[0].shape[1], height, width)
        boxes = convert_boxes_to_pooler_format(box_lists)
        levels = torch.zeros(len(boxes), dtype=torch.int64)
        if len(self.level_poolers) > 1:
            levels = assign_boxes_to_levels(
                box_lists,
                self.min_level,
                self.max_level,
                self.canonical_box_size,
                self.canonical_level,
            )
        # 0 for boxes of no level, whose sides are not numbers or have different signs
        out = x[0].new_zeros(len(boxes), height, width, x[0].shape[1])
        for level, (features, pooler) in enumerate(zip(x, self.level_poolers, strict=True)):
            rows = (levels == level).nonzero()[:, 0]
            pooled = roi_align(
                nhwc(features), boxes[rows], height, width, pooler.spatial_scale,
                pooler.sampling_ratio, pooler.aligned,
            )  # fmt: skip
            out.index_copy_(0, rows, pooled)
        return nchw(out)


class ChannelsLastPooler(FastPooler):
    """The same for heads that take channels-last maps."""

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        return self.pool(x, box_lists) if is_on_cpu(x[0]) else super().forward(x, box_lists)


def become(pooler: ROIPooler, kind: type[FastPooler]) -> bool:
    """Make a pooler one of ``kind``, in place, if it can be one and that is faster.

    Returns:
        whether it is one now.
    """
    if type(pooler) in (ROIPooler, FastPooler):
        is_roi_align = all(type(level) is ROIAlign for level in pooler.level_poolers)
        if is_roi_align and not _extension.WHY_NOT_COMPILED:
            pooler.__class__ = kind
    return isinstance(pooler, kind)


def use_fast_pooling(model: nn.Module) -> None:
    """Make every pooler of a model that can be one a :class:`FastPooler`, in place."""
    for module in model.modules():
        if isinstance(module, ROIPooler):
            become(module, FastPooler)
