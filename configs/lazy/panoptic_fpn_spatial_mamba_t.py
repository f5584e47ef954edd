"""Panoptic FPN: things and stuff, 1x; datasets/prepare_panoptic.py makes the label maps.

python tools/lazyconfig_train_net.py --config-file configs/lazy/panoptic_fpn_spatial_mamba_t.py
"""

from detectron2 import model_zoo

from .common.backbone import with_spatial_mamba
from .common.recipe import COCO, dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model = with_spatial_mamba(model_zoo.get_config("common/models/panoptic_fpn.py").model)
dataloader["data"].update(
    train_sem_seg=f"{COCO}/panoptic_stuff_train2017", test_sem_seg=f"{COCO}/panoptic_stuff_val2017"
)
dataloader["data"]["recipe"] = "panoptic_fpn_spatial_mamba_t"
train["output_dir"] = "output/lazy/panoptic_fpn_spatial_mamba_t"
