"""Detectron2's keys that have no effect here: refused if they are set, instead of ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from detectron2.config import CfgNode

from spatial_mamba_d2.config import differing_values, flat_items
from spatial_mamba_d2.detection.optimizer import PLATEAU


class Unused(NamedTuple):
    """A key, or several by a pattern, that must keep its default.

    Attributes:
        pattern: of names of keys.
        reason: why it has no effect, or what to use instead.
        has_effect: for which configurations it has one after all.
    """

    pattern: str
    reason: str
    has_effect: Callable[[CfgNode], bool] = lambda cfg: False


def _single_stage(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "RetinaNet"


def is_panoptic(cfg: CfgNode) -> bool:
    """Whether the detector has a semantic head, and so needs label maps."""
    return cfg.MODEL.META_ARCHITECTURE == "PanopticFPN"


def uses_point_rend(cfg: CfgNode) -> bool:
    """Whether its mask head is one of PointRend's."""
    return cfg.MODEL.MASK_ON and "PointRend" in cfg.MODEL.ROI_MASK_HEAD.NAME


def refines_semantics(cfg: CfgNode) -> bool:
    """Whether its head for stuff is PointRend's."""
    return is_panoptic(cfg) and cfg.MODEL.SEM_SEG_HEAD.NAME == "PointRendSemSegHead"


def _schedule(*names: str) -> Callable[[CfgNode], bool]:
    return lambda cfg: cfg.SOLVER.LR_SCHEDULER_NAME in names


_PROPOSALS = "proposals are always computed, by the RPN"
_SAMPLER = "images are drawn equally often (DATALOADER.SAMPLER_TRAIN TrainingSampler)"
_ADAMW = "the optimizer is AdamW, which has SOLVER.BETAS"
_DECAY = (
    "SOLVER.WEIGHT_DECAY and BASE_LR hold for all parameters, except that those with norm in their "
    "name have no decay"
)
_SEMANTIC = "MODEL.META_ARCHITECTURE is not PanopticFPN"
_SEGMENTOR = "tools/train_seg.py is for semantic segmentation alone"
_POINT_REND = "MODEL.ROI_MASK_HEAD.NAME is not PointRendMaskHead"
_FED_LOSS = "only LVIS says how many images each class has"
_STEP, _COSINE, _FIXED = "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"

UNUSED = (
    Unused("MODEL.LOAD_PROPOSALS", _PROPOSALS),
    Unused("DATASETS.PROPOSAL_FILES_*", _PROPOSALS),
    Unused("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_*", _PROPOSALS),
    Unused("DATALOADER.REPEAT_*", _SAMPLER),
    Unused("SOLVER.MOMENTUM", _ADAMW),
    Unused("SOLVER.NESTEROV", _ADAMW),
    Unused("SOLVER.WEIGHT_DECAY_*", _DECAY),
    Unused("SOLVER.BIAS_LR_FACTOR", _DECAY),
    Unused("SOLVER.BASE_LR_END", f"only {_COSINE} has it", _schedule(_COSINE)),
    Unused("SOLVER.NUM_DECAYS", f"only {_FIXED} has it", _schedule(_FIXED)),
    Unused("SOLVER.GAMMA", f"{_COSINE} does not have it", _schedule(_STEP, _FIXED, PLATEAU)),
    Unused("SOLVER.PLATEAU_PATIENCE", f"only {PLATEAU} has it", _schedule(PLATEAU)),
    Unused(
        "DATASETS.NEGATIVES_REPEAT",
        "DATASETS.TRAIN_NEGATIVES names no images",
        lambda cfg: bool(cfg.DATASETS.TRAIN_NEGATIVES),
    ),
    Unused(
        "DATASETS.TRAIN_NEGATIVES",
        "Panoptic FPN needs a label map of each image",
        lambda cfg: not is_panoptic(cfg),
    ),
    Unused("MODEL.SEM_SEG_HEAD.*", _SEMANTIC, is_panoptic),
    Unused("MODEL.PANOPTIC_FPN.COMBINE.ENABLED", "results are always combined"),
    Unused("MODEL.PANOPTIC_FPN.*", _SEMANTIC, is_panoptic),
    Unused("DATASETS.*_SEM_SEG", _SEMANTIC, is_panoptic),
    Unused(
        "MODEL.POINT_HEAD.*",
        f"{_POINT_REND}, nor MODEL.SEM_SEG_HEAD.NAME PointRendSemSegHead",
        lambda cfg: uses_point_rend(cfg) or refines_semantics(cfg),
    ),
    Unused("MODEL.IMPLICIT_POINTREND.*", _POINT_REND, uses_point_rend),
    *(
        Unused(f"MODEL.ROI_MASK_HEAD.{key}", _POINT_REND, uses_point_rend)
        for key in ("IN_FEATURES", "FC_DIM", "NUM_FC", "OUTPUT_SIDE_RESOLUTION", "POINT_HEAD_ON")
    ),
    Unused("INPUT.COLOR_AUG_SSD", _SEGMENTOR),
    Unused("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", _SEGMENTOR),
    Unused("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", _FED_LOSS),
    Unused("MODEL.ROI_BOX_HEAD.FED_LOSS_*", _FED_LOSS),
    Unused("MODEL.ANCHOR_GENERATOR.ANGLES", "boxes are not rotated"),
    Unused("GLOBAL.HACK", "nothing reads it"),
    Unused(
        "MODEL.RESNETS.*",
        "the backbone is no ResNet (MODEL.SPATIAL_MAMBA has its keys)",
        lambda cfg: (
            "resnet" in cfg.MODEL.BACKBONE.NAME or cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads"
        ),
    ),
    Unused("MODEL.RETINANET.*", "MODEL.META_ARCHITECTURE is not RetinaNet", _single_stage),
    Unused(
        "MODEL.ROI_BOX_CASCADE_HEAD.*",
        "MODEL.ROI_HEADS.NAME is not CascadeROIHeads",
        lambda cfg: cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads",
    ),
)
# Values of Detectron2's keys for which there are no data here
_IMPOSSIBLE = {
    "MODEL.META_ARCHITECTURE": {"SemanticSegmentor": _SEGMENTOR},
    "MODEL.PROPOSAL_GENERATOR.NAME": {
        "PrecomputedProposals": _PROPOSALS,
        "RRPN": "boxes are not rotated",
    },
    "MODEL.ANCHOR_GENERATOR.NAME": {"RotatedAnchorGenerator": "boxes are not rotated"},
    "MODEL.ROI_HEADS.NAME": {"RROIHeads": "boxes are not rotated"},
}


def check_unused_keys(cfg: CfgNode, defaults: CfgNode) -> None:
    """Raises ValueError if a key without effect, or one without effect on others, is set."""
    found = [
        f"{key} {value}: {entry.reason}"
        for key, (_, value) in differing_values(defaults, cfg).items()
        for entry in UNUSED
        if fnmatchcase(key, entry.pattern) and not entry.has_effect(cfg)
    ]
    values = dict(flat_items(cfg))
    found += [
        f"{key} {values[key]}: {reasons[values[key]]}"
        for key, reasons in _IMPOSSIBLE.items()
        if values[key] in reasons
    ]
    found += _without_partner(cfg)
    if found:
        lines = "".join(f"\n  {line}" for line in found)
        raise ValueError(f"keys that have no effect must keep their defaults:{lines}")


def _without_partner(cfg: CfgNode) -> Iterator[str]:
    """Keys that another one excludes."""
    model, test = cfg.MODEL, cfg.TEST
    if _single_stage(cfg):
        for key in ("MASK_ON", "KEYPOINT_ON"):
            if model[key]:
                yield f"MODEL.{key} True: MODEL.META_ARCHITECTURE RetinaNet finds boxes only"
    if test.AUG.ENABLED and model.META_ARCHITECTURE != "GeneralizedRCNN":
        yield "TEST.AUG.ENABLED True: only MODEL.META_ARCHITECTURE GeneralizedRCNN has it"
    if cfg.DATASETS.TRAIN_NEGATIVES and uses_point_rend(cfg):
        yield (
            f"DATASETS.TRAIN_NEGATIVES {cfg.DATASETS.TRAIN_NEGATIVES}: not for PointRend, which "
            "fails on a batch without objects"
        )
    if cfg.SOLVER.UNFREEZE_ITER and not model.FREEZE:
        yield f"SOLVER.UNFREEZE_ITER {cfg.SOLVER.UNFREEZE_ITER}: MODEL.FREEZE names no parameters"
    if cfg.SOLVER.EMA_DECAY and test.PRECISE_BN.ENABLED:
        yield "TEST.PRECISE_BN.ENABLED True: not for a moving average (SOLVER.EMA_DECAY)"
    if not model.KEYPOINT_ON:
        if len(test.KEYPOINT_OKS_SIGMAS):
            yield "TEST.KEYPOINT_OKS_SIGMAS: MODEL.KEYPOINT_ON is False"
        return
    if test.AUG.ENABLED:
        yield "TEST.AUG.ENABLED True: not for keypoints (MODEL.KEYPOINT_ON)"
    if cfg.INPUT.RANDOM_FLIP == "vertical":
        yield "INPUT.RANDOM_FLIP vertical: not for keypoints (MODEL.KEYPOINT_ON)"
    number = model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    num_sigmas = len(test.KEYPOINT_OKS_SIGMAS) or 17  # COCO's
    if num_sigmas != number:
        yield (
            f"TEST.KEYPOINT_OKS_SIGMAS {list(test.KEYPOINT_OKS_SIGMAS)}: must have "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS {number} numbers, which are the tolerances of "
            "the keypoints in the score; () is COCO's 17"
        )
