"""Keypoint R-CNN: persons and their keypoints, 1x.

python tools/lazyconfig_train_net.py --config-file configs/lazy/keypoint_rcnn_spatial_mamba_t.py
"""

from detectron2 import model_zoo

from .common.backbone import with_spatial_mamba
from .common.recipe import COCO, dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model = with_spatial_mamba(model_zoo.get_config("common/models/keypoint_rcnn_fpn.py").model)
dataloader["data"].update(
    train_json=f"{COCO}/annotations/person_keypoints_train2017.json",
    test_json=f"{COCO}/annotations/person_keypoints_val2017.json",
)
dataloader["data"]["recipe"] = "keypoint_rcnn_spatial_mamba_t"
train["output_dir"] = "output/lazy/keypoint_rcnn_spatial_mamba_t"
