"""Detectron2's RoIAlign poolers with the kernels of this package on CPUs.

torchvision's kernel for the gradients runs in one thread there, and adds to each pixel of each
sample in an order of planes.
"""

from __future__ import annotations

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


class ChannelsLastPooler(ROIPooler):
    """:class:`ROIPooler` of RoIAlign layers."""

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        if not is_on_cpu(x[0]):
            return super().forward(x, box_lists)
        height, width = self.output_size
        boxes = convert_boxes_to_pooler_format(box_lists)
        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        out = x[0].new_empty(len(boxes), height, width, x[0].shape[1])
        for level, (features, pooler) in enumerate(zip(x, self.level_poolers, strict=True)):
            rows = (levels == level).nonzero()[:, 0]
            pooled = roi_align(
                nhwc(features), boxes[rows], height, width, pooler.spatial_scale,
                pooler.sampling_ratio, pooler.aligned,
            )  # fmt: skip
            out.index_copy_(0, rows, pooled)
        return nchw(out)


def with_fast_pooling(pooler: ROIPooler) -> bool:
    """Make a pooler a :class:`ChannelsLastPooler`, in place, if it can be one and that is faster.

    Returns:
        whether it is one now.
    """
    if type(pooler) is ROIPooler:
        is_roi_align = all(type(level) is ROIAlign for level in pooler.level_poolers)
        if is_roi_align and not _extension.WHY_NOT_COMPILED:
            pooler.__class__ = ChannelsLastPooler
    return isinstance(pooler, ChannelsLastPooler)


def use_fast_pooling(model: nn.Module) -> None:
    """The same for all poolers of a model; the classes of others stay as they are."""
    for module in model.modules():
        if isinstance(module, ROIPooler):
            with_fast_pooling(module)
