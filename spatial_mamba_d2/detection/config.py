"""The configuration of the detection tools: Detectron2's keys, the backbone's, and a few more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.projects.point_rend import add_pointrend_config

from spatial_mamba_d2.config import (
    DETECTION_PATHS,
    add_shared_config,
    config_loader,
    require_above_0,
    require_at_least,
    require_between,
    require_evaluations,
    require_length,
    require_low_high,
    require_one_of,
    require_whole,
)
from spatial_mamba_d2.detection.coco_evaluation import PACKAGES, check_installed
from spatial_mamba_d2.detection.data import register_json_datasets
from spatial_mamba_d2.detection.feature_checks import check_features
from spatial_mamba_d2.detection.limits import AUTO
from spatial_mamba_d2.detection.optimizer import PLATEAU
from spatial_mamba_d2.detection.scores import main_scores
from spatial_mamba_d2.detection.unused_keys import (
    check_unused_keys,
    is_panoptic,
    refines_semantics,
    uses_point_rend,
)
from spatial_mamba_d2.training.loggers import check_loggers

_POOLERS = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_GROUPS = 32  # of GN
# Rules for Detectron2's keys, which it does not check, and for ours
_CHOICES: dict[str, Collection[Any]] = {
    "VERSION": (2,),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.CROP.TYPE": ("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "norm", "value"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
        PLATEAU,
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "TEST.EVALUATOR": tuple(PACKAGES),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": _POOLERS,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("", *_POOLERS),  # "": the head pools, as PointRend's
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSSES,
    "MODEL.FPN.NORM": _NORMS,
    "MODEL.RETINANET.NORM": _NORMS,
    "MODEL.ROI_BOX_HEAD.NORM": _NORMS,
    "MODEL.ROI_MASK_HEAD.NORM": _NORMS,
}
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
_MINIMA = {
    "INPUT.MIN_SIZE_TEST": 0,  # 0: images keep their size
    "SOLVER.BASE_LR_END": 0,
    "SOLVER.NUM_DECAYS": 0,
    "MODEL.RPN.SMOOTH_L1_BETA": 0,
    "MODEL.RPN.LOSS_WEIGHT": 0,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 0,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 0,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 0,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 0,
    "MODEL.RETINANET.NUM_CLASSES": 1,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 1,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,  # things, and at least one kind of stuff
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 0,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 0,
    "DATASETS.NEGATIVES_REPEAT": 1,
    "SOLVER.PLATEAU_PATIENCE": 1,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.PRECISE_BN.NUM_ITER": 1,
    "SOLVER.UNFREEZE_ITER": 0,
    "VIS_PERIOD": 0,
}
_ABOVE_0 = (
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.MAX_SIZE_TEST",
    "INPUT.RESIZE_CROP.SIZES",
    "INPUT.SCALE_JITTER.SCALES",
    "INPUT.SCALE_JITTER.SIZE",
    "TEST.AUG.MIN_SIZES",
    "TEST.AUG.MAX_SIZE",
    "SOLVER.STEPS",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "MODEL.FPN.OUT_CHANNELS",
    "MODEL.ANCHOR_GENERATOR.SIZES",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
    "MODEL.RPN.BBOX_REG_WEIGHTS",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
    "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN",
    "MODEL.RPN.POST_NMS_TOPK_TEST",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "MODEL.ROI_BOX_HEAD.CONV_DIM",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM",
)
_FRACTIONS = (  # 0 and 1 included
    "TEST.PICTURES_SCORE_THRESH",
    "MODEL.RPN.IOU_THRESHOLDS",
    "MODEL.RPN.NMS_THRESH",
    "MODEL.ROI_HEADS.IOU_THRESHOLDS",
    "MODEL.RETINANET.IOU_THRESHOLDS",
    "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.RETINANET.NMS_THRESH_TEST",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
)
_SHARES = (  # above 0
    "SOLVER.GAMMA",
    "SOLVER.LAYER_DECAY",
    "MODEL.RPN.POSITIVE_FRACTION",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION",
)
_WHOLE = ("INPUT.MIN_SIZE_TRAIN", "INPUT.RESIZE_CROP.SIZES", "SOLVER.STEPS")


def add_spatial_mamba_config(cfg: CfgNode) -> None:
    """Add every key that our recipes and the ``config.yaml`` of a training use, in place.

    After it, ``cfg.merge_from_file`` takes any of them. Detectron2's own defaults stay as they are.

    Args:
        cfg: from ``detectron2.config.get_cfg()``.
    """
    add_shared_config(cfg)
    add_pointrend_config(cfg)

    # Any data set in COCO format. If a json is given, it replaces the names in TRAIN or TEST. Each
    # is one file or folder, or a list: ("a.json", "b.json") of one folder, or of as many.
    cfg.DATASETS.TRAIN_JSON = ""
    cfg.DATASETS.TRAIN_IMAGES = ""
    cfg.DATASETS.TEST_JSON = ""
    cfg.DATASETS.TEST_IMAGES = ""
    # Images without objects that also train: an image, a folder, a pattern, or a list of these in a
    # .txt file; each NEGATIVES_REPEAT times as often as another image. Images of TRAIN_JSON without
    # objects train if DATALOADER.FILTER_EMPTY_ANNOTATIONS is False.
    cfg.DATASETS.TRAIN_NEGATIVES = ""
    cfg.DATASETS.NEGATIVES_REPEAT = 1
    # Panoptic segmentation: folders of the label maps, NAME.png for the image NAME.jpg.
    cfg.DATASETS.TRAIN_SEM_SEG = ""
    cfg.DATASETS.TEST_SEM_SEG = ""

    # Channels of the images, 1 to 16. For others than 3, PIXEL_MEAN and PIXEL_STD need as many
    # values, and the first convolution starts from its RGB weights.
    cfg.INPUT.CHANNELS = 3
    # Names of the channels, in order, or (): they are kept in checkpoints, and chosen by name from
    # rasters whose bands have descriptions.
    cfg.INPUT.BAND_NAMES = ()

    # The 3x recipe: half of the images are resized to one of SIZES, cropped, and resized again.
    cfg.INPUT.RESIZE_CROP = CfgNode()
    cfg.INPUT.RESIZE_CROP.ENABLED = False
    cfg.INPUT.RESIZE_CROP.SIZES = (400, 500, 600)
    cfg.INPUT.RESIZE_CROP.CROP_RANGE = (384, 600)  # sides of the crop in pixels: shortest, longest

    # Large-scale jitter: images are resized to SIZE times a random factor, cut and padded to SIZE.
    cfg.INPUT.SCALE_JITTER = CfgNode()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    cfg.INPUT.SCALE_JITTER.SCALES = (0.1, 2.0)  # smallest and largest factor
    cfg.INPUT.SCALE_JITTER.SIZE = 1024  # sides in pixels of what the network gets

    # Prefixes of parameters that keep their starting weights, such as ("backbone.bottom_up",); from
    # UNFREEZE_ITER on they are trained, unless it is 0.
    cfg.MODEL.FREEZE = ()
    cfg.SOLVER.UNFREEZE_ITER = 0
    cfg.MODEL.COMPILE = False  # whether torch.compile compiles the backbone
    cfg.SOLVER.EMA_DECAY = 0.0  # above 0: evaluate and save a moving average of the weights
    # Below 1: factor of the learning rate from each block of the backbone to the one before it
    cfg.SOLVER.LAYER_DECAY = 1.0
    # LR_SCHEDULER_NAME WarmupPlateauLR: evaluations without a new best score after which the
    # learning rate falls by GAMMA
    cfg.SOLVER.PLATEAU_PATIENCE = 3

    # The score that chooses model_best.pth, such as bbox/AP50 or segm/AP-circle; "": AP of the
    # keypoints, else the masks, else the boxes; PQ of panoptic segmentation.
    cfg.TEST.BEST_METRIC = ""
    cfg.TEST.PATIENCE = 0  # evaluations without a new best score that end the training; 0: none do
    # What computes COCO's scores: pycocotools, or hotcoco or faster_coco_eval, which are faster.
    cfg.TEST.EVALUATOR = "pycocotools"
    cfg.TEST.PICTURES = 8  # test images to draw with ground truth and prediction
    cfg.TEST.PICTURES_SCORE_THRESH = 0.5


def detection_defaults() -> CfgNode:
    """Detectron2's defaults with our keys, and with other values where our recipes need them."""
    cfg = get_cfg()
    add_spatial_mamba_config(cfg)
    cfg.SEED = 0  # training is reproducible, and resumes on the same curve, unless negative
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    # Detectron2 also has "value" and "norm" (of each parameter).
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    return cfg


def _check_matching(cfg: CfgNode) -> None:
    """Overlaps of boxes with objects, and what a box is between two of them."""
    for part in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = cfg.MODEL[part].IOU_THRESHOLDS, cfg.MODEL[part].IOU_LABELS
        key = f"MODEL.{part}.IOU_THRESHOLDS"
        if not thresholds or list(thresholds) != sorted(thresholds) or thresholds[0] == 0:
            raise ValueError(f"{key} must be ascending and above 0, got {thresholds}")
        if len(labels) != len(thresholds) + 1 or not set(labels) <= {-1, 0, 1}:
            raise ValueError(
                f"MODEL.{part}.IOU_LABELS must be one more than {key}, {len(thresholds) + 1}, each "
                f"of them -1 (ignored), 0 (background) or 1 (object), got {labels}"
            )


def _check_group_norm(cfg: CfgNode) -> None:
    model = cfg.MODEL
    for norm, channels, is_used in (
        ("FPN.NORM", "FPN.OUT_CHANNELS", True),
        ("RETINANET.NORM", "FPN.OUT_CHANNELS", model.META_ARCHITECTURE == "RetinaNet"),
        ("ROI_BOX_HEAD.NORM", "ROI_BOX_HEAD.CONV_DIM", model.ROI_BOX_HEAD.NUM_CONV > 0),
        ("ROI_MASK_HEAD.NORM", "ROI_MASK_HEAD.CONV_DIM", model.MASK_ON),
        ("SEM_SEG_HEAD.NORM", "SEM_SEG_HEAD.CONVS_DIM", is_panoptic(cfg)),
    ):
        (part, key), (its_part, its_key) = norm.split("."), channels.split(".")
        number = model[its_part][its_key]
        if is_used and model[part][key] == "GN" and number % _GROUPS:
            raise ValueError(
                f"MODEL.{channels} must be a multiple of {_GROUPS}, the groups of MODEL.{norm} GN, "
                f"got {number}"
            )


def _check_cascade(cfg: CfgNode) -> None:
    if cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
        return
    cascade, heads = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG must be True for CascadeROIHeads, got False"
        )
    if not cascade.IOUS or list(cascade.IOUS[:1]) != list(heads.IOU_THRESHOLDS):
        raise ValueError(
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS must begin with MODEL.ROI_HEADS.IOU_THRESHOLDS "
            f"{heads.IOU_THRESHOLDS}, got {cascade.IOUS}"
        )
    require_length(cfg, {"MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": len(cascade.IOUS)})


def _check_point_rend(cfg: CfgNode) -> None:
    points, of_masks, of_stuff = cfg.MODEL.POINT_HEAD, uses_point_rend(cfg), refines_semantics(cfg)
    for part, is_refined in (
        ("ROI_HEADS", of_masks and cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON),
        ("SEM_SEG_HEAD", of_stuff),
    ):
        num_classes = cfg.MODEL[part].NUM_CLASSES
        if is_refined and points.NUM_CLASSES != num_classes:
            raise ValueError(
                f"MODEL.POINT_HEAD.NUM_CLASSES must be MODEL.{part}.NUM_CLASSES {num_classes}, "
                f"got {points.NUM_CLASSES}"
            )
    if of_stuff:  # Detectron2 joins several maps along the batch
        require_length(cfg, {"MODEL.POINT_HEAD.IN_FEATURES": 1})
    if not of_masks:
        return
    head_channels, channels = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM, cfg.MODEL.FPN.OUT_CHANNELS
    if head_channels > channels:
        raise ValueError(
            f"MODEL.ROI_MASK_HEAD.CONV_DIM must be at most MODEL.FPN.OUT_CHANNELS {channels} for "
            f"PointRend, got {head_channels}"
        )
    required = {"MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("",), "INPUT.MASK_FORMAT": ("bitmask",)}
    require_one_of(cfg, required)


def _check_crop(cfg: CfgNode) -> None:
    if cfg.INPUT.FORMAT == "BGR" and cfg.INPUT.CHANNELS != 3:
        raise ValueError(
            f"INPUT.FORMAT must be RGB, which leaves channels as they are, for INPUT.CHANNELS "
            f"{cfg.INPUT.CHANNELS}, got BGR"
        )
    kind, size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
    require_length(cfg, {"INPUT.CROP.SIZE": 2})
    if kind.startswith("relative"):
        require_between(cfg, ("INPUT.CROP.SIZE",), 0, 1, include_low=False)
    elif any(side < 1 or side != int(side) for side in size):
        raise ValueError(f"INPUT.CROP.SIZE must be whole numbers above 0 for {kind}, got {size}")
    if kind == "absolute_range":
        require_low_high(cfg, ("INPUT.CROP.SIZE",))
    for key in ("CROP", "RESIZE_CROP"):
        if cfg.INPUT.SCALE_JITTER.ENABLED and cfg.INPUT[key].ENABLED:
            raise ValueError(
                f"INPUT.{key}.ENABLED must be False with INPUT.SCALE_JITTER, which also crops"
            )


def _check_values(cfg: CfgNode) -> None:
    unused = {
        "MODEL.ROI_MASK_HEAD.": not cfg.MODEL.MASK_ON,
        "MODEL.ROI_KEYPOINT_HEAD.": not cfg.MODEL.KEYPOINT_ON,
        "MODEL.SEM_SEG_HEAD.": not is_panoptic(cfg),
    }
    prefixes = tuple(prefix for prefix, is_unused in unused.items() if is_unused)

    def used(keys: Iterable[str]) -> Iterator[str]:
        return (k for k in keys if not k.startswith(prefixes))

    choices = {**_CHOICES, **{k: dict(r) for k, r in _REGISTRIES.items()}}
    require_one_of(cfg, {k: choices[k] for k in used(choices)})
    proposals = ("PrecomputedProposals", *dict(PROPOSAL_GENERATOR_REGISTRY))
    require_one_of(cfg, {"MODEL.PROPOSAL_GENERATOR.NAME": proposals})
    require_one_of(cfg, {"MODEL.ROI_BOX_HEAD.NAME": ("", *dict(ROI_BOX_HEAD_REGISTRY))})
    require_at_least(cfg, {k: _MINIMA[k] for k in used(_MINIMA)})
    require_above_0(cfg, used(_ABOVE_0))
    require_low_high(cfg, ("INPUT.SCALE_JITTER.SCALES",))
    require_between(cfg, _FRACTIONS, 0, 1)
    require_between(cfg, _SHARES, 0, 1, include_low=False)
    require_whole(cfg, _WHOLE)
    require_low_high(cfg, ("INPUT.RESIZE_CROP.CROP_RANGE",))
    _check_crop(cfg)
    _check_matching(cfg)
    _check_group_norm(cfg)
    _check_cascade(cfg)
    _check_point_rend(cfg)
    _check_sizes(cfg)
    _check_schedule(cfg)
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if isinstance(limit, str) and limit != AUTO:
        raise ValueError(
            f"TEST.DETECTIONS_PER_IMAGE must be a whole number or {AUTO}, got {limit!r}"
        )


def _check_sizes(cfg: CfgNode) -> None:
    required = {"INPUT.MIN_SIZE_TRAIN": cfg.INPUT.MIN_SIZE_TRAIN}
    if cfg.TEST.AUG.ENABLED:
        required["TEST.AUG.MIN_SIZES"] = cfg.TEST.AUG.MIN_SIZES
    for key, sizes in required.items():
        if not sizes:
            raise ValueError(f"{key} must be at least one side in pixels, got none")
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        require_low_high(cfg, ("INPUT.MIN_SIZE_TRAIN",))


def _check_scores(cfg: CfgNode) -> None:
    main_scores(cfg)
    if cfg.SOLVER.LR_SCHEDULER_NAME == PLATEAU:
        require_evaluations(cfg, f"SOLVER.LR_SCHEDULER_NAME {PLATEAU}")


def _check_schedule(cfg: CfgNode) -> None:
    steps = cfg.SOLVER.STEPS
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"SOLVER.STEPS must be ascending, got {steps}")
    if cfg.SOLVER.LR_SCHEDULER_NAME == PLATEAU and cfg.SOLVER.GAMMA == 1:
        raise ValueError(f"SOLVER.GAMMA must be below 1 for {PLATEAU}, got {cfg.SOLVER.GAMMA}")
    if cfg.SOLVER.BASE_LR_END > cfg.SOLVER.BASE_LR:
        raise ValueError(
            f"SOLVER.BASE_LR_END must be at most SOLVER.BASE_LR {cfg.SOLVER.BASE_LR}, "
            f"got {cfg.SOLVER.BASE_LR_END}"
        )


def _check_and_resolve(cfg: CfgNode) -> None:
    _check_values(cfg)
    check_unused_keys(cfg, detection_defaults())
    check_features(cfg)
    check_installed(cfg.TEST.EVALUATOR)
    check_loggers(cfg.SOLVER.LOGGERS)
    register_json_datasets(cfg)
    _check_scores(cfg)


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(DETECTION_PATHS, (tuple,)),
    "TEST.DETECTIONS_PER_IMAGE": (str,),
}
load_config = config_loader(detection_defaults, _check_and_resolve, _TYPES)
