"""The detector as a plain module: building it, and its parts with the work of one image."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn


def build_detector(cfg: CfgNode) -> nn.Module:
    """``cfg``'s model with initial weights, on ``cfg.MODEL.DEVICE``."""
    return build_model(cfg)


def run_parts(
    model: GeneralizedRCNN, images: Tensor, proposals: int = 1000, detections: int = 100
) -> list[Any]:
    """Pass shapes through all layers of Mask R-CNN, as images would; works on ``meta`` tensors.

    How many proposals an image has depends on its pixels. The authors' figures come from
    mmdetection's ``_forward``, which sends all proposals that are kept, ``proposals``, through the
    box head and the first ``detections`` of them through the mask head.

    Args:
        model: with ``StandardROIHeads``.
        images: normalised and padded, ``Tensor[B, 3, H, W]``.
        proposals, detections: for each image.

    Returns:
        the outputs of proposal, box and mask head.
    """
    features = model.backbone(images)
    generator, heads = model.proposal_generator, model.roi_heads
    channels = features[heads.box_in_features[0]].shape[1]

    def pooled(number: int, pooler: ROIPooler) -> Tensor:
        return images.new_zeros(len(images) * number, channels, *pooler.output_size)

    return [
        generator.rpn_head([features[name] for name in generator.in_features]),
        heads.box_predictor(heads.box_head(pooled(proposals, heads.box_pooler))),
        heads.mask_head.layers(pooled(detections, heads.mask_pooler)),
    ]
