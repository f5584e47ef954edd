"""Mask R-CNN on the small backbone, 3x: multi-scale training with crops.

python tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_spatial_mamba_s_3x.py
"""

from .mask_rcnn_spatial_mamba_s import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

lr_multiplier.steps = [197910, 241890]
train["max_iter"] = 263880
dataloader["data"]["recipe"] = "mask_rcnn_spatial_mamba_s_3x"
train["output_dir"] = "output/lazy/mask_rcnn_spatial_mamba_s_3x"
