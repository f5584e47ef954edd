"""The tiny backbone in place of ResNet, and images in RGB."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from spatial_mamba_d2.detection.backbone import build_bottom_up

PIXEL_MEAN, PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def with_spatial_mamba(model: DictConfig) -> DictConfig:
    """One of Detectron2's common models on our backbone, in place."""
    features = list(model.backbone.bottom_up.out_features)
    model.backbone.bottom_up = L(build_bottom_up)(variant="tiny", out_features=features)
    model.pixel_mean, model.pixel_std = PIXEL_MEAN, PIXEL_STD
    model.input_format = "RGB"
    return model
