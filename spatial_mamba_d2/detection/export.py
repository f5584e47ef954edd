"""Mask R-CNN and Faster R-CNN as one function of an image, for export.

The same modules and the same arithmetic as Detectron2's inference, without its ``Boxes``,
``Instances`` and ``ImageList``, and without a branch that depends on data: height, width and the
number of detections, none included, are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ROIAlign
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from spatial_mamba_d2.detection.predict import Predictor
from spatial_mamba_d2.export.exportable import (
    Difference,
    Exportable,
    Normalize,
    Outputs,
    Tolerance,
)
from spatial_mamba_d2.export.portable import portable_copy

MASK_THRESHOLD = 0.5
_PAIRED_IOU = 0.9  # of a detection and the same one in another answer


def require_exportable(model: Any) -> None:
    """Raises ValueError if ``model`` has a part that :class:`ExportableDetector` does not have."""
    _require("MODEL.META_ARCHITECTURE", model, GeneralizedRCNN)
    rpn, roi = model.proposal_generator, model.roi_heads
    _require("MODEL.PROPOSAL_GENERATOR.NAME", rpn, RPN)
    _require("MODEL.ANCHOR_GENERATOR.NAME", rpn.anchor_generator, DefaultAnchorGenerator)
    _require("MODEL.ROI_HEADS.NAME", roi, StandardROIHeads)
    _require("the box predictor", roi.box_predictor, FastRCNNOutputLayers)
    _require("MODEL.ROI_BOX_HEAD.POOLER_TYPE", roi.box_pooler.level_poolers[0], ROIAlign)
    if roi.mask_on:
        _require("MODEL.ROI_MASK_HEAD.NAME", roi.mask_head, MaskRCNNConvUpsampleHead)
        _require("MODEL.ROI_MASK_HEAD.POOLER_TYPE", roi.mask_pooler.level_poolers[0], ROIAlign)
    if roi.keypoint_on:
        raise ValueError("MODEL.KEYPOINT_ON must be False for export, got True")
    if roi.box_predictor.use_sigmoid_ce:
        raise ValueError("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE must be False for export, got True")


def _require(name: str, part: object, required: type) -> None:
    if type(part) is not required:
        raise ValueError(
            f"{name} must be {required.__name__} for export, got {type(part).__name__}"
        )


def decode(deltas: Tensor, boxes: Tensor, transform: Box2BoxTransform) -> Tensor:
    """``Box2BoxTransform.apply_deltas``.

    Args:
        deltas: ``Tensor[N, K, 4]``.
        boxes: (x0, y0, x1, y1), ``Tensor[N, 4]``.

    Returns:
        ``Tensor[N, K, 4]``.
    """
    size = (boxes[:, 2:] - boxes[:, :2]).unsqueeze(1)
    centre = boxes[:, :2].unsqueeze(1) + 0.5 * size
    wx, wy, ww, wh = transform.weights
    shift = deltas[..., :2] / deltas.new_tensor([wx, wy])
    scale = (deltas[..., 2:] / deltas.new_tensor([ww, wh])).clamp(max=transform.scale_clamp)
    new_centre, half = shift * size + centre, 0.5 * (scale.exp() * size)
    return torch.cat((new_centre - half, new_centre + half), -1)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """``Tensor[..., 4]`` within the image."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    corners = (x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height))
    return torch.stack(corners, -1)


def best(scores: Tensor, number: int) -> Tensor:
    """Indices of the ``number`` largest of ``Tensor[N]``, or of all, in descending order."""
    return scores.topk(torch.sym_min(scores.shape[0], number))[1]


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices that ``nms`` keeps, in the order of scores, and two that are too large.

    ``torch.export`` takes it for granted that two boxes remain. So two empty ones, which overlap
    nothing, are appended; :func:`append_empty` gives the tensors to which these indices belong.
    """
    return nms(append_empty(boxes), append_empty(scores, -torch.inf), threshold)


def append_empty(x: Tensor, value: float = 0) -> Tensor:
    """``Tensor[N, ...]`` with two more rows of one ``value``."""
    return torch.cat((x, x.new_full((2, *x.shape[1:]), value)))


class Anchors(nn.Module):
    """The anchors of one level, by their indices, so that there is no table for a size."""

    cell: Tensor

    def __init__(self, cell: Tensor, stride: int, offset: float):
        super().__init__()
        self.register_buffer("cell", cell.clone(), persistent=False)
        self.stride, self.offset = stride, offset

    def forward(self, index: Tensor, columns: int) -> Tensor:
        """Indices of a map ``[H, W, anchors]`` with W ``columns`` -> boxes, ``Tensor[N, 4]``."""
        number = self.cell.shape[0]
        place = torch.div(index, number, rounding_mode="floor")
        y = torch.div(place, columns, rounding_mode="floor")
        corner = (torch.stack((place - y * columns, y), 1).float() + self.offset) * self.stride
        return self.cell[index - place * number] + torch.cat((corner, corner), 1)


class ExportableDetector(nn.Module):
    """``uint8 Tensor[H, W, C]`` -> boxes, scores, classes and, with a mask head, masks.

    They are ``float32 [N, 4]`` (x0, y0, x1, y1 in the input's pixels), ``float32 [N]``,
    ``int64 [N]`` and ``float32 [N, M, M]``, probabilities within the box; N is 0 or more.

    Args:
        model: a Detectron2 model in eval mode, with portable operators.

    Raises:
        ValueError: it has other parts than a Mask R-CNN or Faster R-CNN.
    """

    def __init__(self, model: Any):
        require_exportable(model)
        super().__init__()
        rpn: Any = model.proposal_generator
        roi: Any = model.roi_heads
        self.backbone: Any = model.backbone
        self.rpn_head, self.rpn_features = rpn.rpn_head, rpn.in_features
        self.box_head, self.box_predictor = roi.box_head, roi.box_predictor
        self.box_pooler, self.box_features = roi.box_pooler, roi.box_in_features
        self.mask_head = roi.mask_head if roi.mask_on else None
        if roi.mask_on:
            self.mask_pooler, self.mask_features = roi.mask_pooler, roi.mask_in_features
        channels: Any = (model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist())
        self.normalize = Normalize(*channels)
        anchors = rpn.anchor_generator
        self.anchors = nn.ModuleList(
            Anchors(cell, stride, anchors.offset)
            for cell, stride in zip(anchors.cell_anchors, anchors.strides, strict=True)
        )
        self.rpn_transform = rpn.box2box_transform
        self.pre_nms, self.post_nms = rpn.pre_nms_topk[False], rpn.post_nms_topk[False]
        self.rpn_iou, self.min_box_size = rpn.nms_thresh, rpn.min_box_size

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[:2]
        features = self.backbone(self.prepare(image))
        proposals = self.propose(features, height, width)
        boxes, scores, classes = self.detect(features, proposals, height, width)
        if self.mask_head is None:
            return boxes, scores, classes
        maps = [features[name] for name in self.mask_features]
        logits = self.mask_head.layers(pool(self.mask_pooler, maps, boxes))
        if logits.shape[1] == 1:
            return boxes, scores, classes, logits[:, 0].sigmoid()
        rows = torch.arange(classes.shape[0], device=classes.device)
        return boxes, scores, classes, logits[rows, classes].sigmoid()

    def prepare(self, image: Tensor) -> Tensor:
        """Normalise, and pad with 0 at the right and at the bottom."""
        x = self.normalize(image.unsqueeze(0))
        height, width = image.shape[:2]
        divisor = max(self.backbone.size_divisibility, 1)
        below = (height + divisor - 1) // divisor * divisor - height
        beside = (width + divisor - 1) // divisor * divisor - width
        return F.pad(x, (0, beside, 0, below))

    def propose(self, features: dict[str, Tensor], height: int, width: int) -> Tensor:
        """Boxes of the RPN, ``Tensor[N, 4]``, in the order of their scores."""
        all_logits, all_deltas = self.rpn_head([features[name] for name in self.rpn_features])
        levels = [
            self.propose_level(anchors, logits, deltas, height, width)
            for anchors, logits, deltas in zip(self.anchors, all_logits, all_deltas, strict=True)
        ]
        boxes, scores = (torch.cat(parts) for parts in zip(*levels, strict=True))
        return boxes[best(scores, self.post_nms)]

    def propose_level(
        self, anchors: nn.Module, logits: Tensor, deltas: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Boxes and scores from one level, ``Tensor[1, A, h, w]`` and ``Tensor[1, 4 A, h, w]``."""
        columns = logits.shape[-1]
        scores = logits[0].permute(1, 2, 0).reshape(-1)
        deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
        index = best(scores, self.pre_nms)
        scores = scores[index]
        boxes = decode(deltas[index].unsqueeze(1), anchors(index, columns), self.rpn_transform)
        boxes = clip(boxes.squeeze(1), height, width)
        keep = suppress(boxes, scores, self.rpn_iou)
        boxes, scores = append_empty(boxes)[keep], append_empty(scores)[keep]
        # Empty boxes overlap nothing, so that they can be dropped after NMS as well as before.
        keep = (boxes[:, 2:] - boxes[:, :2] > self.min_box_size).all(1).nonzero().squeeze(1)
        return boxes[keep], scores[keep]

    def detect(
        self, features: dict[str, Tensor], proposals: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        predictor = self.box_predictor
        maps = [features[name] for name in self.box_features]
        logits, deltas = predictor(self.box_head(pool(self.box_pooler, maps, proposals)))
        scores = logits.softmax(-1)[:, :-1]  # [N, K]
        boxes = decode(deltas.unflatten(1, (-1, 4)), proposals, predictor.box2box_transform)
        boxes = clip(boxes, height, width).expand(-1, scores.shape[1], 4)
        row, classes = (scores > predictor.test_score_thresh).nonzero().unbind(1)
        boxes, scores = boxes[row, classes], scores[row, classes]
        # NMS within each class: boxes of different ones are moved apart. They lie within the image.
        apart = classes.float() * (torch.sym_max(height, width) + 1)
        keep = suppress(boxes + apart.unsqueeze(1), scores, predictor.test_nms_thresh)
        keep = keep[: predictor.test_topk_per_image]
        boxes, scores, classes = (append_empty(x)[keep] for x in (boxes, scores, classes))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero().squeeze(1)
        return boxes[keep], scores[keep], classes[keep]


def pool(pooler: ROIPooler, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """``ROIPooler``: features in each box from the level of its size, ``Tensor[N, C, P, P]``."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = pooler.canonical_level + torch.log2(area.sqrt() / pooler.canonical_box_size + 1e-8)
    level = level.floor().clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    rois = F.pad(boxes, (1, 0))  # of image 0
    order, parts = [], []
    for i, (x, align) in enumerate(zip(maps, pooler.level_poolers, strict=True)):
        index = (level == i).nonzero().squeeze(1)
        order.append(index)
        parts.append(
            roi_align(
                x,
                rois[index],
                align.output_size,
                align.spatial_scale,
                align.sampling_ratio,
                align.aligned,
            )
        )
    return torch.cat(parts)[torch.cat(order).argsort()]


def build_exportable(cfg: CfgNode) -> Exportable:
    """The detector of ``cfg`` with ``MODEL.WEIGHTS``.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, do not fit, or there is no form for
            export of a part of the model.
    """
    predictor = Predictor(cfg)
    model: Any = predictor.model
    require_exportable(model)
    names = ("boxes", "scores", "classes", "masks")
    return Exportable(
        module=ExportableDetector(portable_copy(model)).eval(),
        native=None,  # AOTInductor compiled masks that were wrong, without an error
        reference=lambda image: detect_in(model, image),
        outputs=names if model.roi_heads.mask_on else names[:3],
        takes_batches=False,
        num_channels=len(cfg.MODEL.PIXEL_MEAN),
        trace_px=(150, 203),
        check_px=((304, 256), (250, 333), (131, 97), (300, 70), (320, 448)),
        compare=lambda expected, found, tolerance: compare_detections(
            expected, found, tolerance, model.roi_heads.box_predictor.test_score_thresh,
            model.roi_heads.box_predictor.test_topk_per_image,
        ),
        metadata={
            "task": "detection",
            "architecture": cfg.MODEL.META_ARCHITECTURE,
            "classes": list(predictor.metadata.thing_classes),
            "channels": cfg.INPUT.FORMAT,
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "std": list(cfg.MODEL.PIXEL_STD),
            "resize": {
                "filter": "bilinear",
                "short_px": cfg.INPUT.MIN_SIZE_TEST,
                "long_px": cfg.INPUT.MAX_SIZE_TEST,
            },
            "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "mask_threshold": MASK_THRESHOLD,
        },
    )  # fmt: skip


def detect_in(model: Any, image: Tensor) -> Outputs:
    """Detectron2's own answer for ``uint8 Tensor[H, W, C]``, before masks are pasted."""
    with torch.no_grad():
        batch = [{"image": image.permute(2, 0, 1).contiguous()}]
        found = model.inference(batch, do_postprocess=False)[0]
    found = found[found.pred_boxes.nonempty()]  # as its postprocessing does
    outputs = {
        "boxes": found.pred_boxes.tensor,
        "scores": found.scores,
        "classes": found.pred_classes,
    }
    if found.has("pred_masks"):
        outputs["masks"] = found.pred_masks[:, 0]
    return {name: value.numpy() for name, value in outputs.items()}


def compare_detections(
    expected: Outputs, found: Outputs, tolerance: Tolerance, threshold: float, limit: int
) -> list[Difference]:
    """Pair detections by class and nearest box, since those with equal scores may be swapped.

    A detection must have a partner in the other answer unless its score is within the margin of
    the least score that is reported.

    Args:
        threshold: of scores.
        limit: the largest number of detections in an image.
    """
    pairs = _pair(expected, found)
    unpaired = 0
    for answer, paired in ((expected, pairs[:, 0]), (found, pairs[:, 1])):
        scores = answer["scores"]
        least = max(threshold, scores.min()) if len(scores) >= limit else threshold
        alone = np.delete(scores, paired)
        unpaired += int((alone > least + tolerance.margin).sum())
    differences = [Difference("detections without partner", unpaired, 0)]
    mine, theirs = pairs.T
    for name, limit_ in (("boxes", tolerance.box_px), ("scores", tolerance.score)):
        apart = np.abs(expected[name][mine] - found[name][theirs])
        differences.append(Difference(name, float(apart.max(initial=0)), limit_))
    if "masks" in expected:
        worst = max(
            (
                _mask_distance(expected["masks"][i], found["masks"][j], tolerance.margin)
                for i, j in pairs
            ),
            default=0.0,
        )
        differences.append(Difference("1 - IoU of masks", worst, 1 - tolerance.mask_iou))
    return differences


def _pair(expected: Outputs, found: Outputs) -> np.ndarray:
    """Indices of the same detections in both, ``int64[P, 2]``; the most certain choose first."""
    pairs, free = [], np.ones(len(found["scores"]), bool)
    for i in expected["scores"].argsort()[::-1]:
        candidates = np.flatnonzero(free & (found["classes"] == expected["classes"][i]))
        if not len(candidates):
            continue
        overlaps = _box_iou(expected["boxes"][i], found["boxes"][candidates])
        if overlaps.max() > _PAIRED_IOU:
            j = candidates[overlaps.argmax()]
            free[j] = False
            pairs.append((i, j))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _box_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    both = np.prod(np.clip(high - low, 0, None), 1)
    either = np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], 1) - both
    return both / either


def _mask_distance(expected: np.ndarray, found: np.ndarray, margin: float) -> float:
    """1 - IoU of two masks, without cells that are at most ``margin`` from the threshold."""
    decided = np.abs(expected - MASK_THRESHOLD) > margin
    a, b = ((x > MASK_THRESHOLD) & decided for x in (expected, found))
    union = np.count_nonzero(a | b)
    return 1 - np.count_nonzero(a & b) / union if union else 0.0
