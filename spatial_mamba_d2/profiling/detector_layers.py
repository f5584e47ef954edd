"""All layers of a detector with a fixed amount of work, whatever the images show."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def forward_all_layers(
    model: Any, images: Tensor, num_proposals: int = 1000, num_detections: int = 100
) -> list[Any]:
    """Pass shapes through all layers of a detector, as images would; works on ``meta`` tensors.

    How many proposals an image has depends on its pixels. The authors' figures come from
    mmdetection's ``_forward``, which sends all ``num_proposals`` that are kept through the box
    head and the first ``num_detections`` of them through the mask head; heads of cascades,
    keypoints and points are counted in the same way.

    Args:
        model: Detectron2's ``RetinaNet``; or ``GeneralizedRCNN`` or ``PanopticFPN`` with
            ``StandardROIHeads`` or ``CascadeROIHeads``.
        images: normalised and padded, ``Tensor[B, 3, H, W]``.
        num_proposals, num_detections: for each image.

    Returns:
        the outputs of the heads.
    """
    features = model.backbone(images)
    if hasattr(model, "head_in_features"):
        return [model.head([features[name] for name in model.head_in_features])]
    generator, heads = model.proposal_generator, model.roi_heads
    channels = features[heads.box_in_features[0]].shape[1]

    def pooled(num_boxes: int, *size: int) -> Tensor:
        return images.new_zeros(len(images) * num_boxes, channels, *size)

    outputs = [generator.rpn_head([features[name] for name in generator.in_features])]
    stages = [(heads.box_head, heads.box_predictor)]
    if isinstance(heads.box_head, nn.ModuleList):
        stages = [*zip(heads.box_head, heads.box_predictor, strict=True)]
    boxes = pooled(num_proposals, *heads.box_pooler.output_size)
    outputs += [predictor(head(boxes)) for head, predictor in stages]
    if heads.mask_on and heads.mask_pooler is None:
        outputs += _forward_points(heads.mask_head, pooled, num_detections)
    elif heads.mask_on:
        masks = pooled(num_detections, *heads.mask_pooler.output_size)
        outputs.append(heads.mask_head.layers(masks))
    if heads.keypoint_on:
        points = pooled(num_detections, *heads.keypoint_pooler.output_size)
        outputs.append(heads.keypoint_head.layers(points))
    if hasattr(model, "sem_seg_head"):
        outputs += _forward_semantics(model.sem_seg_head, features)
    return outputs


def _forward_semantics(head: Any, features: dict[str, Tensor]) -> list[Any]:
    """The head for stuff; of PointRend's, the points of each step of subdivision too."""
    if not hasattr(head, "coarse_sem_seg_head"):
        return [head.layers(features)]
    coarse = head.coarse_sem_seg_head.layers(features)
    batch, num_classes = coarse.shape[:2]
    channels = sum(features[name].shape[1] for name in head.in_features)
    number, steps = head.subdivision_num_points, head.subdivision_steps
    numbers = [head.train_num_points] if head.training else [number] * steps
    return [coarse] + [
        head.point_head(
            coarse.new_empty(batch, channels, n), coarse.new_empty(batch, num_classes, n)
        )
        for n in numbers
    ]


def _forward_points(head: Any, pooled: Any, num_detections: int) -> list[Any]:
    """PointRend's mask head: a coarse mask, then the points of each step of subdivision."""
    coarse = head.coarse_head(pooled(num_detections, head.roi_pooler_size, head.roi_pooler_size))
    if head.training:
        numbers = [head.mask_point_train_num_points]
    else:
        side = head.mask_point_subdivision_init_resolution
        numbers = [side**2] + [
            min(head.mask_point_subdivision_num_points, (side * 2**step) ** 2)
            for step in range(1, head.mask_point_subdivision_steps + 1)
        ]
    classes = coarse.shape[1]
    return [
        coarse,
        *(
            head.point_head(
                pooled(num_detections, number), coarse.new_zeros(len(coarse), classes, number)
            )
            for number in numbers
        ),
    ]
