"""Mask R-CNN with large-scale jitter, 100 epochs.

python tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_spatial_mamba_t_lsj.py
"""

from .mask_rcnn_spatial_mamba_t import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

lr_multiplier.steps = [163048, 175872]
train.update(max_iter=183200, eval_period=9160, checkpointer={"period": 9160, "max_to_keep": 100})
optimizer.lr = 0.0002
dataloader["train"].batch_size = 64
dataloader["data"]["recipe"] = "mask_rcnn_spatial_mamba_t_lsj"
train["output_dir"] = "output/lazy/mask_rcnn_spatial_mamba_t_lsj"
