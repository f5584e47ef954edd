"""Faster R-CNN: boxes only, 1x.

python tools/lazyconfig_train_net.py --config-file configs/lazy/faster_rcnn_spatial_mamba_t.py
"""

from .mask_rcnn_spatial_mamba_t import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

for key in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(key)
dataloader["data"]["recipe"] = "faster_rcnn_spatial_mamba_t"
train["output_dir"] = "output/lazy/faster_rcnn_spatial_mamba_t"
