"""Mask R-CNN with PointRend's mask head, 1x.

python tools/lazyconfig_train_net.py --config-file configs/lazy/point_rend_spatial_mamba_t.py
"""

from detectron2.config import LazyCall as L
from detectron2.projects.point_rend.roi_heads import PointRendROIHeads

from spatial_mamba_d2.detection.lazy import build_point_rend_head

from .mask_rcnn_spatial_mamba_t import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.roi_heads.update(
    _target_=PointRendROIHeads,
    train_on_pred_boxes=True,
    mask_in_features=["p2", "p3", "p4", "p5"],
    mask_pooler=None,
    mask_head=L(build_point_rend_head)(num_classes="${..num_classes}"),
)
dataloader["data"]["recipe"] = "point_rend_spatial_mamba_t"
train["output_dir"] = "output/lazy/point_rend_spatial_mamba_t"
