"""Detectron2 integration: importing this package registers the backbones.

>>> from detectron2.config import get_cfg
>>> from spatial_mamba_d2.detection import add_spatial_mamba_config
>>> cfg = get_cfg()
>>> add_spatial_mamba_config(cfg)
>>> cfg.MODEL.BACKBONE.NAME = "build_spatial_mamba_fpn_backbone"
"""

from detectron2.modeling import build_model

from spatial_mamba_d2.detection.backbone import (
    SpatialMambaBottomUp,
    build_spatial_mamba_backbone,
    build_spatial_mamba_fpn_backbone,
    build_spatial_mamba_retinanet_fpn_backbone,
)
from spatial_mamba_d2.detection.config import add_spatial_mamba_config
from spatial_mamba_d2.detection.optimized import register_parts

__all__ = [
    "SpatialMambaBottomUp",
    "add_spatial_mamba_config",
    "build_model",
    "build_spatial_mamba_backbone",
    "build_spatial_mamba_fpn_backbone",
    "build_spatial_mamba_retinanet_fpn_backbone",
]

register_parts()
