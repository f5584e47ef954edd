"""The models, and the loading of their weights."""

from spatial_mamba_d2.models.checkpoints.loading import LoadReport, load_weights
from spatial_mamba_d2.models.checkpoints.reading import read_checkpoint
from spatial_mamba_d2.models.classifier import SpatialMambaClassifier, build_classifier
from spatial_mamba_d2.models.optimized import optimize_for_inference
from spatial_mamba_d2.models.pointwise import with_plain_linear_layers
from spatial_mamba_d2.models.quantized import quantize_for_inference
from spatial_mamba_d2.models.spatial_mamba import (
    SpatialMamba,
    SpatialMambaBackbone,
    build_backbone,
)
from spatial_mamba_d2.models.upernet import UPerNet, build_upernet
from spatial_mamba_d2.models.variants import VARIANTS

__all__ = [
    "VARIANTS",
    "LoadReport",
    "SpatialMamba",
    "SpatialMambaBackbone",
    "SpatialMambaClassifier",
    "UPerNet",
    "build_backbone",
    "build_classifier",
    "build_upernet",
    "load_weights",
    "optimize_for_inference",
    "quantize_for_inference",
    "read_checkpoint",
    "with_plain_linear_layers",
]
