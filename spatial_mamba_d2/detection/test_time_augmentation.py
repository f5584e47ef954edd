"""Evaluation on several sizes of each image and their mirror images: ``TEST.AUG``."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from spatial_mamba_d2.detection.augmentation import ResizeShortestEdge


class AugmentedViews:
    """The views of an image that ``TEST.AUG`` asks for, resized as in training.

    Detectron2's own resizes through Pillow, and an image that has been resized before.
    """

    def __init__(self, cfg: CfgNode):
        self.min_sizes, self.max_size = cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE
        self.flips = (False, True) if cfg.TEST.AUG.FLIP else (False,)

    def __call__(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The record, with an ``image`` of its original size, once for each view.

        Each has the ``transforms`` that lead from the image to the view.
        """
        image = record.pop("image").permute(1, 2, 0).numpy()
        views = []
        for min_size in self.min_sizes:
            for flip in self.flips:
                augmentations = [ResizeShortestEdge([min_size], self.max_size, "choice")]
                if flip:
                    augmentations.append(T.RandomFlip(prob=1.0))
                view, transforms = T.apply_augmentations(augmentations, image)
                tensor = torch.as_tensor(np.ascontiguousarray(view.transpose(2, 0, 1)))
                views.append({**copy.copy(record), "image": tensor, "transforms": transforms})
        return views


def build_augmented_model(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """``model`` on all views of an image, whose boxes are merged and whose masks are averaged."""
    return GeneralizedRCNNWithTTA(cfg, model, AugmentedViews(cfg))


def without_resize(cfg: CfgNode) -> CfgNode:
    """The configuration by which images are read in their original size."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.freeze()
    return cfg
