"""Panoptic FPN with PointRend's semantic head, 1x.

python tools/lazyconfig_train_net.py --config-file configs/lazy/panoptic_point_rend_spatial_mamba_t.py
"""

from detectron2.config import LazyCall as L

from spatial_mamba_d2.detection.lazy import build_point_rend_semantic_head

from .panoptic_fpn_spatial_mamba_t import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.sem_seg_head = L(build_point_rend_semantic_head)(num_classes=54)
dataloader["data"]["recipe"] = "panoptic_point_rend_spatial_mamba_t"
train["output_dir"] = "output/lazy/panoptic_point_rend_spatial_mamba_t"
