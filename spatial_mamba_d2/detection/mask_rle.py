"""Masks of many objects in bounded memory: pasted into a crop, and encoded one by one.

Detectron2 pastes all masks of an image into maps of the image's size: 2,000 objects in an image of
2,000 x 2,000 pixels are 8 GB. Here an object takes the memory of its box, and then of its RLE. The
pixels are the same as those of Detectron2 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Instances
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spatial_mamba_d2.prediction.masks import Rle, paste_rle

_CHUNK = 100  # objects that pass through the heads of masks and keypoints at once


class RleMasks:
    """Masks of objects in one image, as a field of Detectron2's ``Instances``.

    Iterating decodes them one at a time, to ``bool[H, W]``.

    Args:
        rles: of each object.
    """

    def __init__(self, rles: list[Rle]):
        self.rles = rles

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (coco_mask.decode(rle).astype(bool) for rle in self.rles)

    def __getitem__(self, item: slice | Tensor) -> RleMasks:
        """Some of them: a slice, or a tensor ``bool[N]`` or of indices."""
        if isinstance(item, slice):
            return RleMasks(self.rles[item])
        indices = item.nonzero()[:, 0] if item.dtype == torch.bool else item
        return RleMasks([self.rles[i] for i in indices.tolist()])

    def to(self, *args: Any, **kwargs: Any) -> RleMasks:
        """Itself: they are on no device."""
        return self


class MaskByMask(nn.Module):
    """A detector in inference, whose masks are :class:`RleMasks`; see :func:`with_rle_masks`."""

    def __init__(self, model: GeneralizedRCNN):
        super().__init__()
        self.model = model
        self.training = model.training

    @torch.no_grad()
    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        """As Detectron2's detectors in eval mode."""
        images = self.model.preprocess_image(inputs)
        features = self.model.backbone(images.tensor)
        proposals, _ = self.model.proposal_generator(images, features, None)
        heads = self.model.roi_heads
        is_on = heads.mask_on, heads.keypoint_on
        heads.mask_on = heads.keypoint_on = False
        try:
            detected, _ = heads(images, features, proposals, None)
        finally:
            heads.mask_on, heads.keypoint_on = is_on
        results = []
        for index, (item, instances) in enumerate(zip(inputs, detected, strict=True)):
            of_image = {name: maps[index : index + 1] for name, maps in features.items()}
            height = item.get("height", instances.image_size[0])
            width = item.get("width", instances.image_size[1])
            parts = [
                _encode(heads.forward_with_given_boxes(of_image, [part])[0], height, width)
                for part in _chunks(instances)
            ]
            masks = RleMasks([rle for _, rles in parts for rle in rles])
            merged = Instances.cat([part for part, _ in parts])
            merged.pred_masks = masks
            results.append({"instances": merged})
        return results


def _chunks(instances: Instances) -> Iterator[Instances]:
    """Parts with a bounded number of objects; one without any if there are none."""
    for start in range(0, max(1, len(instances)), _CHUNK):
        yield instances[start : start + _CHUNK]


def _encode(instances: Instances, height: int, width: int) -> tuple[Instances, list[Rle]]:
    """Objects in the frame of the original image, without masks, and their masks."""
    masks = instances.pred_masks[:, 0].float().cpu()
    instances.remove("pred_masks")
    instances.rows = torch.arange(len(instances))
    kept = detector_postprocess(instances, height, width)
    rows = kept.rows.tolist()
    kept.remove("rows")
    boxes = kept.pred_boxes.tensor.float().cpu()
    size = (height, width)
    return kept, [paste_rle(masks[r], box, size) for r, box in zip(rows, boxes, strict=True)]


def with_rle_masks(model: nn.Module) -> nn.Module:
    """The model for inference in bounded memory; itself if it has no masks or combines them.

    Args:
        model: a detector of Detectron2's.
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    if type(network) is GeneralizedRCNN and getattr(network.roi_heads, "mask_on", False):
        return MaskByMask(network)
    return model
