"""Data sets in COCO format, by Detectron2's names or by config keys, checked before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode

from spatial_mamba_d2.data.coco import CocoDataset, load_coco

Record = dict[str, Any]
_CLEANED = ":cleaned"
logger = logging.getLogger(__name__)


def resolve_datasets(cfg: CfgNode) -> None:
    """Turn ``DATASETS.{TRAIN,TEST}_{JSON,IMAGES}`` into names in ``DATASETS.TRAIN`` and ``.TEST``.

    ``cfg`` must not be frozen.
    """
    for split in ("TRAIN", "TEST"):
        json_file, images = cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"]
        if json_file:
            name = f"{Path(json_file).resolve()} of {Path(images).resolve()}"
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=images, evaluator_type="coco"
            )
            cfg.DATASETS[split] = (name,)


def load_records(cfg: CfgNode, name: str, *, is_train: bool) -> list[Record]:
    """The images and annotations of a data set, in Detectron2's format.

    A data set in COCO format is checked as it is read; others come from Detectron2's catalogue as
    they are. In training, images without an object are left out where
    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` says so. What ``DATASETS.ON_ERROR skip`` leaves out of a
    test set is left out of its evaluation too (:func:`evaluation_metadata`).

    Raises:
        FileNotFoundError: the json is missing.
        ValueError: broken images or annotations, an empty data set, or a number of classes that
            is not ``MODEL.ROI_HEADS.NUM_CLASSES``.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "coco" and metadata.get("json_file"):
        skip = cfg.DATASETS.ON_ERROR == "skip"
        coco = load_coco(
            metadata.json_file,
            metadata.image_root,
            on_error=cfg.DATASETS.ON_ERROR,
            check_decode=skip and not is_train,
        )
        _check_classes(cfg, metadata, coco)
        if cfg.MODEL.MASK_ON and is_train:
            _check_masks(metadata, coco)
        records = _to_detectron2(coco)
        if coco.problems and not is_train:
            _register_cleaned(cfg, metadata, coco)
    else:
        records = list(DatasetCatalog.get(name))
    if is_train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        kept = [r for r in records if any(not a["iscrowd"] for a in r["annotations"])]
        if not kept:
            raise ValueError(f"data set {name}: none of its {len(records)} images has an object")
        logger.info("%s: %d of %d images have objects", name, len(kept), len(records))
        records = kept
    return records


def evaluation_metadata(name: str) -> Metadata:
    """Metadata of what a data set is evaluated on: itself, or what was left after skipping."""
    cleaned = name + _CLEANED
    return MetadataCatalog.get(cleaned if cleaned in MetadataCatalog.list() else name)


def _check_classes(cfg: CfgNode, metadata: Metadata, coco: CocoDataset) -> None:
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(coco.categories) != num_classes:
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES must be {len(coco.categories)}, the number of categories "
            f"in {metadata.json_file}, got {num_classes}"
        )
    if not metadata.get("thing_classes"):
        metadata.set(
            thing_classes=[name for _, name in coco.categories],
            thing_dataset_id_to_contiguous_id={
                id_: i for i, (id_, _) in enumerate(coco.categories)
            },
        )


def _check_masks(metadata: Metadata, coco: CocoDataset) -> None:
    for record in coco.records:
        for annotation in record["annotations"]:
            if annotation.get("segmentation") is None:
                raise ValueError(
                    f"{metadata.json_file}: annotation {annotation['id']} has no segmentation: "
                    "MODEL.MASK_ON False trains on boxes only"
                )


def _to_detectron2(coco: CocoDataset) -> list[Record]:
    contiguous = {id_: i for i, (id_, _) in enumerate(coco.categories)}
    records = []
    for image in coco.records:
        annotations = [
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": contiguous[annotation["category_id"]],
                "iscrowd": annotation.get("iscrowd", 0),
                "segmentation": annotation.get("segmentation"),
            }
            for annotation in image["annotations"]
        ]
        records.append({**image, "annotations": annotations})
    return records


def _register_cleaned(cfg: CfgNode, metadata: Metadata, coco: CocoDataset) -> None:
    """Write what is left of a test set to ``OUTPUT_DIR``, for pycocotools to evaluate on."""
    content = {
        "info": {},
        "licenses": [],
        "categories": [{"id": id_, "name": name} for id_, name in coco.categories],
        "images": [
            {"id": r["image_id"], **{key: r[key] for key in ("file_name", "height", "width")}}
            for r in coco.records
        ],
        "annotations": [annotation for r in coco.records for annotation in r["annotations"]],
    }
    path = Path(cfg.OUTPUT_DIR) / f"cleaned_{Path(metadata.json_file).name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    rest = {k: v for k, v in metadata.as_dict().items() if k not in ("name", "json_file")}
    MetadataCatalog.get(metadata.name + _CLEANED).set(json_file=str(path), **rest)
