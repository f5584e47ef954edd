"""All layers of a detector with a fixed amount of work, whatever the images show."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def forward_all_layers(
    model: Any, images: Tensor, num_proposals: int = 1000, num_detections: int = 100
) -> list[Any]:
    """Pass shapes through all layers of Mask R-CNN, as images would; works on ``meta`` tensors.

    How many proposals an image has depends on its pixels. The authors' figures come from
    mmdetection's ``_forward``, which sends all ``num_proposals`` that are kept through the box
    head and the first ``num_detections`` of them through the mask head.

    Args:
        model: Detectron2's ``GeneralizedRCNN`` with ``StandardROIHeads``.
        images: normalised and padded, ``Tensor[B, 3, H, W]``.
        num_proposals, num_detections: for each image.

    Returns:
        the outputs of proposal, box and mask head.
    """
    features = model.backbone(images)
    generator, heads = model.proposal_generator, model.roi_heads
    channels = features[heads.box_in_features[0]].shape[1]

    def pooled(num_boxes: int, pooler: Any) -> Tensor:
        return images.new_zeros(len(images) * num_boxes, channels, *pooler.output_size)

    return [
        generator.rpn_head([features[name] for name in generator.in_features]),
        heads.box_predictor(heads.box_head(pooled(num_proposals, heads.box_pooler))),
        heads.mask_head.layers(pooled(num_detections, heads.mask_pooler)),
    ]
