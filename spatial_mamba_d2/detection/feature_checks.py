"""Feature maps and anchors of a detector's configuration: which there are, and who uses them."""

from __future__ import annotations

from detectron2.config import CfgNode

# Whose IN_FEATURES a detector uses; the anchors are on those of the first
_PARTS_WITH_FEATURES = {
    "GeneralizedRCNN": ("RPN", "ROI_HEADS"),
    "PanopticFPN": ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"),
    "ProposalNetwork": ("RPN",),
    "RetinaNet": ("RETINANET",),
}
# The coarsest level of our pyramids
_LAST_LEVELS = {
    "build_spatial_mamba_fpn_backbone": 6,
    "build_spatial_mamba_retinanet_fpn_backbone": 7,
}


def _feature_maps(model: CfgNode) -> tuple[list[str], str] | None:
    """Names of the feature maps of our backbones, from fine to coarse, and what they come from."""
    bare = list(model.SPATIAL_MAMBA.OUT_FEATURES)
    if model.BACKBONE.NAME == "build_spatial_mamba_backbone":
        return bare, "MODEL.SPATIAL_MAMBA.OUT_FEATURES"
    last_level = _LAST_LEVELS.get(model.BACKBONE.NAME)
    if last_level is None:
        return None
    levels = [f"res{n}" for n in range(2, 6)]
    used = list(model.FPN.IN_FEATURES)
    if used not in (levels[first:] for first in range(4)):  # p6 is made from res5 or its p5
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES must be {levels} or the last ones of these, got {used}"
        )
    if missing := [name for name in used if name not in bare]:
        raise ValueError(
            f"MODEL.SPATIAL_MAMBA.OUT_FEATURES must have {', '.join(missing)} of "
            f"MODEL.FPN.IN_FEATURES, got {bare}"
        )
    names = [f"p{n}" for n in range(6 - len(used), last_level + 1)]
    return names, "the pyramid of MODEL.FPN.IN_FEATURES"


def check_features(cfg: CfgNode) -> None:
    """Raises ValueError if names of feature maps, or the lists of anchors, do not fit together."""
    model = cfg.MODEL
    parts = _PARTS_WITH_FEATURES.get(model.META_ARCHITECTURE)
    if parts is None:
        return
    maps = _feature_maps(model)
    for part in parts:
        used = list(model[part].IN_FEATURES)
        if not used:
            raise ValueError(f"MODEL.{part}.IN_FEATURES must be at least one, got none")
        if maps and (unknown := set(used) - set(maps[0])):
            raise ValueError(
                f"MODEL.{part}.IN_FEATURES must be among {', '.join(maps[0])}, which {maps[1]} "
                f"has, got {', '.join(sorted(unknown))}"
            )
    _check_anchors(
        model.ANCHOR_GENERATOR, f"MODEL.{parts[0]}.IN_FEATURES", len(model[parts[0]].IN_FEATURES)
    )


def _check_anchors(anchors: CfgNode, features: str, num_features: int) -> None:
    for key in ("SIZES", "ASPECT_RATIOS"):
        if (number := len(anchors[key])) not in (1, num_features):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{key} must be one list or {num_features}, one for "
                f"each of {features}, got {number}"
            )
    sizes, ratios = (list(map(len, anchors[key])) for key in ("SIZES", "ASPECT_RATIOS"))
    length = max(len(sizes), len(ratios))
    numbers = [
        size * ratio
        for size, ratio in zip(
            sizes * (length // len(sizes)), ratios * (length // len(ratios)), strict=True
        )
    ]
    if len(set(numbers)) != 1 or 0 in numbers:
        raise ValueError(
            "MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS must give each feature map the same "
            f"number of anchors, at least 1, got {numbers}"
        )
