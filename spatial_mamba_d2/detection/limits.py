"""``TEST.DETECTIONS_PER_IMAGE auto``: the limit on detections that the data ask for."""

from __future__ import annotations

import logging
import math

from detectron2.config import CfgNode

from spatial_mamba_d2.detection.data import (
    DetectionDataset,
    load_dataset,
    load_training_datasets,
)

logger = logging.getLogger(__name__)

AUTO = "auto"
_MARGIN = 1.5  # detections for each object of the fullest image
_STEP = 100  # COCO's limit, and the least


def most_objects(datasets: list[DetectionDataset]) -> int:
    """In one image, without crowds."""
    numbers = (
        sum(not annotation["iscrowd"] for annotation in record.get("annotations", ()))
        for dataset in datasets
        for record in dataset.records
    )
    return max(numbers, default=0)


def limit_for(num_objects: int) -> int:
    """Half as many more than the objects, in whole hundreds, at least 100."""
    return max(1, math.ceil(_MARGIN * num_objects / _STEP)) * _STEP


def with_resolved_limit(cfg: CfgNode, *, is_training: bool) -> CfgNode:
    """The configuration with a number in place of ``auto``; else itself.

    The number follows from the image with most objects, of the test sets and, in a training, of the
    training sets.

    Raises:
        FileNotFoundError, ValueError: see :func:`~.data.load_dataset`.
    """
    if cfg.TEST.DETECTIONS_PER_IMAGE != AUTO:
        return cfg
    datasets = load_training_datasets(cfg) if is_training else []
    classes = datasets[0].classes if datasets else None
    datasets += [
        load_dataset(cfg, name, is_train=False, classes=classes) for name in cfg.DATASETS.TEST
    ]
    number = most_objects(datasets)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.DETECTIONS_PER_IMAGE = limit_for(number)
    cfg.freeze()
    logger.info(
        "TEST.DETECTIONS_PER_IMAGE is %d, because an image has %d objects",
        cfg.TEST.DETECTIONS_PER_IMAGE, number,
    )  # fmt: skip
    return cfg


def require_number(cfg: CfgNode) -> None:
    """Raises ValueError if the limit is still ``auto``, where there are no data to take it from."""
    if cfg.TEST.DETECTIONS_PER_IMAGE == AUTO:
        raise ValueError(
            f"TEST.DETECTIONS_PER_IMAGE must be a number in prediction, got {AUTO}: the config.yaml"
            " of the training has the one that its data gave"
        )
