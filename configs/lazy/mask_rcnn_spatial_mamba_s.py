"""Mask R-CNN on the small backbone, 1x.

python tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_spatial_mamba_s.py
"""

from .mask_rcnn_spatial_mamba_t import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.bottom_up.variant = "small"
dataloader["data"]["recipe"] = "mask_rcnn_spatial_mamba_s"
train["output_dir"] = "output/lazy/mask_rcnn_spatial_mamba_s"
