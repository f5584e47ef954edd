"""The backbone with Detectron2's interface, bare and with a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from spatial_mamba_d2.config import backbone_kwargs
from spatial_mamba_d2.models import SpatialMambaBackbone
from spatial_mamba_d2.models.variants import variant_kwargs

OUT_FEATURES = ("res2", "res3", "res4", "res5")


class SpatialMambaBottomUp(SpatialMambaBackbone, Backbone):
    """:class:`~spatial_mamba_d2.models.SpatialMambaBackbone` with Detectron2's interface."""

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=channels, stride=stride)
            for name, (channels, stride) in super().output_shape().items()
        }


def build_bottom_up(
    variant: str, out_features: Sequence[str] = OUT_FEATURES, **options: Any
) -> SpatialMambaBottomUp:
    """The bare backbone, for Python configurations.

    Args:
        variant: ``tiny``, ``small`` or ``base``.
        out_features: names of the feature maps.
        **options: of :class:`~spatial_mamba_d2.models.SpatialMambaBackbone`, instead of those of
            the variant.

    Raises:
        ValueError: a value is out of its range.
    """
    return SpatialMambaBottomUp(
        **variant_kwargs(variant, {"out_features": tuple(out_features), **options})
    )


@BACKBONE_REGISTRY.register()
def build_spatial_mamba_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SpatialMambaBottomUp:
    """The bare backbone from ``cfg.MODEL.SPATIAL_MAMBA`` and ``cfg.MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        ValueError: a value is out of its range.
    """
    mamba = cfg.MODEL.SPATIAL_MAMBA
    return build_bottom_up(
        mamba.VARIANT, mamba.OUT_FEATURES, in_chans=input_shape.channels, **backbone_kwargs(cfg)
    )


@BACKBONE_REGISTRY.register()
def build_spatial_mamba_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The backbone with Detectron2's FPN and a max-pooled ``p6``."""
    return _build_pyramid(cfg, build_spatial_mamba_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_spatial_mamba_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The backbone with Detectron2's FPN, and ``p6`` and ``p7`` convolved from ``res5``."""
    bottom_up = build_spatial_mamba_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _build_pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def compile_backbone(model: nn.Module) -> None:
    """Let ``torch.compile`` compile our backbone in ``model`` at its next call, in place.

    Names of parameters and checkpoints stay as they are. Inductor may not choose memory formats:
    activations are channels-last already, and its choice fails in training once a size varies
    ("cannot determine truth value of Relational", PyTorch 2.14).

    Raises:
        ValueError: the model has none of our backbones.
    """
    found = [module for module in model.modules() if isinstance(module, SpatialMambaBackbone)]
    if not found:
        raise ValueError("MODEL.COMPILE must be False for a model without a Spatial-Mamba backbone")
    for backbone in found:
        backbone.compile(options={"layout_optimization": False})


def _build_pyramid(cfg: CfgNode, bottom_up: SpatialMambaBottomUp, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
