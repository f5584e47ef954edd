"""RetinaNet: boxes in a single stage, 1x.

python tools/lazyconfig_train_net.py --config-file configs/lazy/retinanet_spatial_mamba_t.py
"""

from detectron2 import model_zoo

from .common.backbone import with_spatial_mamba
from .common.recipe import dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model = with_spatial_mamba(model_zoo.get_config("common/models/retinanet.py").model)
model.backbone.top_block.in_channels = 512  # of res5
model.smooth_l1_beta = 0.0
# 1, 2^(1/3) and 2^(2/3) times 32, 64, ...
model.anchor_generator.sizes = [
    [32, 40.317, 50.797],
    [64, 80.635, 101.594],
    [128, 161.27, 203.187],
    [256, 322.54, 406.375],
    [512, 645.08, 812.75],
]
dataloader["data"]["num_classes"] = "${model.num_classes}"
dataloader["data"]["recipe"] = "retinanet_spatial_mamba_t"
train["output_dir"] = "output/lazy/retinanet_spatial_mamba_t"
