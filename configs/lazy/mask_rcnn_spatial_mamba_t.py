"""Mask R-CNN, 1x.

python tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_spatial_mamba_t.py
"""

from detectron2 import model_zoo

from .common.backbone import with_spatial_mamba
from .common.recipe import dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model = with_spatial_mamba(model_zoo.get_config("common/models/mask_rcnn_fpn.py").model)
dataloader["data"]["recipe"] = "mask_rcnn_spatial_mamba_t"
train["output_dir"] = "output/lazy/mask_rcnn_spatial_mamba_t"
