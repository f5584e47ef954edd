"""The configuration of the segmentation tools: the official recipe, on the generated shapes."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from spatial_mamba_d2.config import (
    add_lightning_config,
    config_loader,
    require_at_least,
    require_between,
    require_low_high,
    require_one_of,
    require_whole,
)
from spatial_mamba_d2.models.timm_backbone import PREFIX, check_timm_name
from spatial_mamba_d2.segmentation.losses import PIXEL_LOSSES
from spatial_mamba_d2.training.loggers import check_loggers

OURS = "spatial_mamba"


def segmentation_defaults() -> CfgNode:
    """All keys; each is explained where it is set, here or in ``add_lightning_config``."""
    cfg = CfgNode()
    cfg.OUTPUT_DIR = "output/upernet"
    add_lightning_config(cfg)

    cfg.MODEL.NUM_CLASSES = 6
    cfg.MODEL.SPATIAL_MAMBA.BN = "sync"  # for the heads too; becomes train without a GPU
    # spatial_mamba, or timm/NAME with a name of timm.list_models(). MODEL.SPATIAL_MAMBA counts for
    # both, except VARIANT; MODEL.WEIGHTS may then be a file of timm's classifier.
    cfg.MODEL.BACKBONE.NAME = OURS
    cfg.MODEL.UPERNET = CfgNode()
    cfg.MODEL.UPERNET.CHANNELS = 512
    cfg.MODEL.UPERNET.DROPOUT = 0.1
    cfg.MODEL.UPERNET.AUX_CHANNELS = 256
    cfg.MODEL.UPERNET.AUX_WEIGHT = 0.4  # weight of the auxiliary loss
    # Weight of each class in both losses; (): 1 for all. ("auto",): the more, the rarer a class is
    # in the training labels; the cube root of the median frequency over its own, 0.1 to 10.
    cfg.MODEL.CLASS_WEIGHTS = ()
    # Of each pixel, in both losses: cross_entropy, focal, or ohem, which is of the hardest ones.
    cfg.MODEL.PIXEL_LOSS = "cross_entropy"
    cfg.MODEL.FOCAL_GAMMA = 2.0
    cfg.MODEL.OHEM_SHARE = 0.25  # of the pixels of an image
    cfg.MODEL.DICE_WEIGHT = 0.0  # weight of a Dice loss of the decode head, on top
    cfg.MODEL.LOVASZ_WEIGHT = 0.0  # the same of a Lovász-Softmax loss

    # Any data set in ADE20K's folder layout: ROOT/images/SPLIT/*, ROOT/annotations/SPLIT/*.png,
    # with or without subfolders.
    cfg.DATASETS.ROOT = "datasets/shapes"
    # A split is the name of a folder, or a file in ROOT with one name a line, such as
    # ImageSets/Segmentation/train.txt. TEST may be "": training without evaluation.
    cfg.DATASETS.TRAIN = "training"
    cfg.DATASETS.TEST = "validation"
    # Where images and labels are in ROOT. {split} is left out if the split is a file of names.
    cfg.DATASETS.IMAGE_FOLDER = "images/{split}"
    cfg.DATASETS.LABEL_FOLDER = "annotations/{split}"
    # How file names end after what an image and its label have in common: _leftImg8bit.png and
    # _gtFine_labelIds.png, for example, or _mask with any suffix of images.
    cfg.DATASETS.IMAGE_SUFFIX = ""
    cfg.DATASETS.LABEL_SUFFIX = ""
    # A file of names in ROOT, one a line; ade20k, cityscapes or voc; or "" for numbers.
    cfg.DATASETS.CLASSES = "objectInfo.txt"
    cfg.DATASETS.LABEL_OFFSET = 1  # class 0 is stored as this
    cfg.DATASETS.IGNORE_LABELS = (0,)  # stored integers that are ignored in training and scores
    # The class of each stored value or colour, if LABEL_OFFSET and IGNORE_LABELS, which it
    # replaces, do not say it: "0: background, 255: 1", "#804080: road, (70, 70, 70): 2, *: ignore",
    # "0-6: ignore, 7: 0, 8: 1"; a text file in ROOT with such entries, one a line; cityscapes for
    # its label ids; or voc. A class is an index, a name or "ignore"; * is everything else.
    cfg.DATASETS.LABEL_MAP = ""

    # Channels of the images, 1 to 16. For others than 3, PIXEL_MEAN and PIXEL_STD need as many
    # values, and the first convolution starts from its RGB weights.
    cfg.INPUT.CHANNELS = 3
    # Names of the channels, in order, or (): they are kept in checkpoints, and chosen by name from
    # rasters whose bands have descriptions.
    cfg.INPUT.BAND_NAMES = ()
    # Images are resized to this short side in training and evaluation, unless the long side would
    # exceed LONG_PX.
    cfg.INPUT.SHORT_PX = 512
    cfg.INPUT.LONG_PX = 2048
    cfg.INPUT.RATIO_RANGE = (0.5, 2.0)  # in training, both are multiplied by a factor in this range
    cfg.INPUT.CROP_PX = 512
    cfg.INPUT.MAX_CLASS_SHARE = 0.75  # a crop with a larger share of one class is drawn again
    cfg.INPUT.FLIP = True
    cfg.INPUT.PHOTOMETRIC = True  # without 3 channels, only brightness and contrast

    # Over all processes; each needs at least 2 in a micro-batch, for the batch norms, or
    # MODEL.SPATIAL_MAMBA.BN sync and several processes.
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.BASE_LR = 6e-5
    cfg.SOLVER.WEIGHT_DECAY = 0.01
    cfg.SOLVER.WARMUP_ITERS = 1500
    cfg.SOLVER.WARMUP_FACTOR = 1e-6
    cfg.SOLVER.MAX_ITER = 160_000  # the learning rate falls linearly to 0 by then
    cfg.SOLVER.CHECKPOINT_PERIOD = 2000

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_PERIOD = 16_000  # iterations; 0: only at the end
    cfg.TEST.PATIENCE = 0  # evaluations without a new best score that end the training; 0: none do
    cfg.TEST.MODE = "whole"  # "whole" images, or "slide": windows with averaged logits
    # "whole" refuses views with more pixels than this, before the system ends the process for want
    # of memory: UPerNet with the tiny variant and 150 classes takes 2.2 GB per million pixels.
    cfg.TEST.MAX_WHOLE_PX = 10_000_000
    cfg.TEST.CROP_PX = 512  # side of the sliding window
    cfg.TEST.STRIDE_PX = 341
    # ss: fitted into the frame of INPUT. ms: 0.75, 1 and 1.25 times the image, with flip.
    # ms_wide: 0.5 to 1.75 times the image in six steps, with flip. custom: the three keys below.
    cfg.TEST.PROTOCOL = "ss"
    cfg.TEST.SCALES = (1.0,)
    cfg.TEST.SCALES_OF = "frame"  # or "image"
    cfg.TEST.FLIP = False
    cfg.TEST.PICTURES = 8  # test images to draw with ground truth and prediction
    # Folder for the predicted label maps as PNG, in the values (or colours) that label files store;
    # "": none.
    cfg.TEST.SAVE_LABELS = ""
    return cfg


def _check_backbone(backbone: CfgNode) -> None:
    if backbone.NAME == OURS:
        return
    if not backbone.NAME.startswith(PREFIX):
        raise ValueError(
            f"MODEL.BACKBONE.NAME must be {OURS} or {PREFIX}NAME, with a name of "
            f"timm.list_models(), got {backbone.NAME!r}"
        )
    check_timm_name(backbone.NAME, "MODEL.BACKBONE.NAME")
    if backbone.FREEZE_AT:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT must be 0 with MODEL.BACKBONE.NAME {backbone.NAME}, because "
            f"which parameters belong to a stage is unknown, got {backbone.FREEZE_AT}"
        )


def _check(cfg: CfgNode) -> None:
    check_loggers(cfg.SOLVER.LOGGERS)
    require_one_of(
        cfg,
        {
            "TEST.MODE": ("whole", "slide"),
            "TEST.PROTOCOL": ("ss", "ms", "ms_wide", "custom"),
            "TEST.SCALES_OF": ("frame", "image"),
            "MODEL.PIXEL_LOSS": PIXEL_LOSSES,
        },
    )
    require_at_least(
        cfg,
        {
            "SEED": 0,
            "MODEL.DICE_WEIGHT": 0,
            "MODEL.LOVASZ_WEIGHT": 0,
            "MODEL.FOCAL_GAMMA": 0,
            "INPUT.SHORT_PX": 1,
            "INPUT.LONG_PX": cfg.INPUT.SHORT_PX,
            "INPUT.CROP_PX": 1,
            "TEST.CROP_PX": 1,
            "TEST.MAX_WHOLE_PX": 1,
            "TEST.STRIDE_PX": 1,
            "DATASETS.LABEL_OFFSET": 0,
            "DATASETS.IGNORE_LABELS": 0,
            "MODEL.UPERNET.CHANNELS": 1,
            "MODEL.UPERNET.AUX_CHANNELS": 1,
            "MODEL.UPERNET.AUX_WEIGHT": 0,
        },
    )
    require_between(cfg, ("MODEL.UPERNET.DROPOUT",), 0, 1, include_high=False)
    require_between(cfg, ("INPUT.MAX_CLASS_SHARE", "MODEL.OHEM_SHARE"), 0, 1, include_low=False)
    require_whole(cfg, ("DATASETS.IGNORE_LABELS",))
    _check_backbone(cfg.MODEL.BACKBONE)
    if cfg.TEST.STRIDE_PX > cfg.TEST.CROP_PX:
        raise ValueError(
            f"TEST.STRIDE_PX must be at most TEST.CROP_PX {cfg.TEST.CROP_PX} to cover all pixels, "
            f"got {cfg.TEST.STRIDE_PX}"
        )
    if cfg.MODEL.NUM_CLASSES < 2:
        raise ValueError(
            "MODEL.NUM_CLASSES must be at least 2: one class against a background is two, because "
            f"background is a class, got {cfg.MODEL.NUM_CLASSES}"
        )
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH == solver.ACCUMULATION_STEPS:
        raise ValueError(
            "SOLVER.IMS_PER_BATCH must be at least 2 x SOLVER.ACCUMULATION_STEPS "
            f"{solver.ACCUMULATION_STEPS}, because batch norm needs 2 images at a time, got "
            f"{solver.IMS_PER_BATCH}"
        )
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN must name a split, got ''")
    weights = tuple(cfg.MODEL.CLASS_WEIGHTS)
    if weights == ("auto",):
        pass
    elif weights and not (
        len(weights) == cfg.MODEL.NUM_CLASSES
        and all(isinstance(w, (int, float)) and w >= 0 for w in weights)
        and any(weights)
    ):
        raise ValueError(
            f"MODEL.CLASS_WEIGHTS must be empty or {cfg.MODEL.NUM_CLASSES} (MODEL.NUM_CLASSES) "
            f"numbers of at least 0, not all 0, or ('auto',), got {weights}"
        )
    require_low_high(cfg, ("INPUT.RATIO_RANGE",))
    if not cfg.TEST.SCALES or min(cfg.TEST.SCALES) <= 0:
        raise ValueError(f"TEST.SCALES must be numbers above 0, got {cfg.TEST.SCALES}")


load_config = config_loader(segmentation_defaults, _check)
