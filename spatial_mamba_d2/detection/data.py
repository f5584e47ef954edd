"""Training and test images of detection: any data in COCO format, checked before training."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    Metadata,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data import detection_utils as d2_utils
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch.utils.data import DataLoader

from spatial_mamba_d2.data.coco import CocoDataset, load_coco
from spatial_mamba_d2.data.images import orientation_hint, read_image
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.data.samplers import ResumableBatchSampler, SkippingDataset
from spatial_mamba_d2.detection.augmentation import build_augmentation
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.seeding import seeded
from spatial_mamba_d2.system.workers import single_thread_opencv, worker_options

Record = dict[str, Any]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionDataset:
    """A data set as the trainer and the evaluator need it.

    Attributes:
        name: key in Detectron2's catalogue.
        records: images and annotations, in Detectron2's format.
        classes: names by index; None if the data set has none.
        category_ids: of the classes, in the file; empty if it is not in COCO format.
        json_file: the file in COCO format, if there is one.
        coco: what is left of that file if anything was skipped.
    """

    name: str
    records: list[Record]
    classes: list[str] | None
    category_ids: list[int] = field(default_factory=list)
    json_file: str | None = None
    coco: CocoDataset | None = None


def register_json_datasets(cfg: CfgNode) -> None:
    """Register ``DATASETS.{TRAIN,TEST}_{JSON,IMAGES}`` with Detectron2, under a name each.

    The names take the place of those in ``DATASETS.TRAIN`` and ``DATASETS.TEST``; ``cfg`` must not
    be frozen.
    """
    for split in ("TRAIN", "TEST"):
        json_file, images = cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"]
        if json_file:
            json_file, images = str(Path(json_file).resolve()), str(Path(images).resolve())
            name = f"{json_file} of {images}"
            MetadataCatalog.get(name).set(
                json_file=json_file, image_root=images, evaluator_type="coco"
            )
            cfg.DATASETS[split] = (name,)


def load_dataset(cfg: CfgNode, name: str, *, is_train: bool) -> DetectionDataset:
    """The data set that Detectron2 knows as ``name``.

    One in COCO format is checked as it is read; others come from Detectron2's catalogue as they
    are. In training, images without an object are left out if
    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` says so.

    Raises:
        FileNotFoundError: the json is missing.
        ValueError: broken images or annotations, an empty data set, or a number of classes that
            is not ``MODEL.ROI_HEADS.NUM_CLASSES``.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "coco" and metadata.get("json_file"):
        dataset = _load_coco_dataset(cfg, metadata, is_train)
    else:
        dataset = DetectionDataset(
            name, list(DatasetCatalog.get(name)), metadata.get("thing_classes")
        )
    if is_train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        num_images = len(dataset.records)
        kept = [r for r in dataset.records if any(not a["iscrowd"] for a in r["annotations"])]
        if not kept:
            raise ValueError(f"data set {name}: none of its {num_images} images has an object")
        logger.info("%s: %d of %d images have objects", name, len(kept), num_images)
        dataset = replace(dataset, records=kept)
    return dataset


def _load_coco_dataset(cfg: CfgNode, metadata: Metadata, is_train: bool) -> DetectionDataset:
    coco = load_coco(
        metadata.json_file,
        metadata.image_root,
        on_error=cfg.DATASETS.ON_ERROR,
        check_decode=cfg.DATASETS.ON_ERROR == "skip" and not is_train,
        value_range=build_pixel_range(cfg.INPUT.PIXEL_RANGE),
    )
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(coco.categories) != num_classes:
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES must be {len(coco.categories)}, the number of categories "
            f"in {metadata.json_file}, got {num_classes}"
        )
    if cfg.MODEL.MASK_ON and is_train:
        _check_masks(metadata.json_file, coco)
    ids, names = ([*values] for values in zip(*coco.categories, strict=True))
    return DetectionDataset(
        metadata.name,
        _to_detectron2(coco, ids),
        names,
        ids,
        metadata.json_file,
        coco if coco.faults else None,
    )


def _check_masks(json_file: str, coco: CocoDataset) -> None:
    for record in coco.records:
        for annotation in record["annotations"]:
            if annotation.get("segmentation") is None:
                raise ValueError(
                    f"{json_file}: annotation {annotation['id']} has no segmentation: "
                    "MODEL.MASK_ON False trains on boxes only"
                )


def _to_detectron2(coco: CocoDataset, category_ids: Sequence[int]) -> list[Record]:
    class_index = {id_: index for index, id_ in enumerate(category_ids)}
    records = []
    for image in coco.records:
        annotations = [
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": class_index[annotation["category_id"]],
                "iscrowd": annotation.get("iscrowd", 0),
                "segmentation": annotation.get("segmentation"),
            }
            for annotation in image["annotations"]
        ]
        records.append({**image, "annotations": annotations})
    return records


def register_for_evaluation(cfg: CfgNode, dataset: DetectionDataset) -> Metadata:
    """Detectron2's metadata by which predictions for ``dataset`` are evaluated; in all processes.

    What ``DATASETS.ON_ERROR skip`` skipped is not evaluated either: what is left is written to
    ``OUTPUT_DIR``, by one process per machine, for pycocotools to read.
    """
    if dataset.json_file is None:
        return MetadataCatalog.get(dataset.name)
    json_file = dataset.json_file
    if dataset.coco:
        path = Path(cfg.OUTPUT_DIR, f"cleaned_{Path(json_file).name}")
        if comm.get_local_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(_to_coco(dataset.coco)), encoding="utf-8")
        json_file = str(path)
    comm.synchronize()  # in all processes, even if only one machine's copy has faults
    name = f"{dataset.name} (evaluation)"
    if name in MetadataCatalog.list():  # entry of the previous evaluation, whose file may differ
        MetadataCatalog.pop(name)
    return MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=MetadataCatalog.get(dataset.name).image_root,
        evaluator_type="coco",
        thing_classes=dataset.classes,
        thing_dataset_id_to_contiguous_id={id_: i for i, id_ in enumerate(dataset.category_ids)},
    )


def _to_coco(coco: CocoDataset) -> dict[str, Any]:
    return {
        "info": {},
        "licenses": [],
        "categories": [{"id": id_, "name": name} for id_, name in coco.categories],
        "images": [
            {"id": r["image_id"], **{key: r[key] for key in ("file_name", "height", "width")}}
            for r in coco.records
        ],
        "annotations": [annotation for r in coco.records for annotation in r["annotations"]],
    }


class Mapper(DatasetMapper):
    """Detectron2's mapper with our reading of images, our augmentation, and errors with names."""

    def __init__(self, cfg: CfgNode, is_train: bool):
        super().__init__(
            is_train,
            augmentations=build_augmentation(cfg, is_train),
            image_format=cfg.INPUT.FORMAT,
            use_instance_mask=cfg.MODEL.MASK_ON,
            instance_mask_format=cfg.INPUT.MASK_FORMAT,
        )
        self.value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)

    def __call__(self, record: Record) -> Record:
        return self.transform(*self.read(record))

    def read(self, record: Record) -> tuple[Record, np.ndarray]:
        """A copy of the record, and its image in ``INPUT.FORMAT``.

        Raises:
            FileNotFoundError: the image is missing.
            ValueError: it is truncated, no image, or of another size than its record says.
        """
        image = read_image(record["file_name"], value_range=self.value_range)
        record = copy.deepcopy(record)
        try:
            d2_utils.check_image_size(record, image)
        except d2_utils.SizeMismatchError as error:
            hint = orientation_hint(record["file_name"], (record["height"], record["width"]))
            raise ValueError(f"image file {record['file_name']}: {error}{hint}") from None
        if "sem_seg_file_name" in record:  # of data sets in Detectron2's catalogue
            label = d2_utils.read_image(record.pop("sem_seg_file_name"), "L").squeeze(2)
            record["sem_seg"] = label
        return record, image[..., ::-1] if self.image_format == "BGR" else image

    def transform(
        self, record: Record, image: np.ndarray, rng: np.random.Generator | None = None
    ) -> Record:
        """Augment what :meth:`read` gave, into an input of Detectron2's models.

        Args:
            rng: seeds the augmentations, which draw from the global generators; None leaves them.

        Raises:
            ValueError: the annotations do not fit ``INPUT.MASK_FORMAT``.
        """
        aug_input = T.AugInput(image, sem_seg=record.get("sem_seg"))
        with seeded(int(rng.integers(2**32))) if rng else contextlib.nullcontext():
            transforms = self.augmentations(aug_input)
        image = aug_input.image
        if aug_input.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(aug_input.sem_seg.astype("long"))
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
            return record
        if "annotations" not in record:
            return record
        try:
            self._transform_annotations(record, transforms, image.shape[:2])
        except ValueError as error:
            raise ValueError(f"annotations of image {record['file_name']}: {error}") from error
        return record


def load_training_datasets(cfg: CfgNode) -> list[DetectionDataset]:
    """The data sets in ``DATASETS.TRAIN``; raises as :func:`load_dataset`, and for none at all."""
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN must name at least one data set, got none")
    return [load_dataset(cfg, name, is_train=True) for name in cfg.DATASETS.TRAIN]


def build_train_loader(cfg: CfgNode, datasets: Sequence[DetectionDataset]) -> DataLoader:
    """Endless micro-batches, as lists of Detectron2 inputs.

    ``ACCUMULATION_STEPS`` of them, from all processes, hold the ``IMS_PER_BATCH`` of an iteration.
    """
    records = [record for dataset in datasets for record in dataset.records]
    groups = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = [int(r["width"] > r["height"]) for r in records]
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    sampler = ResumableBatchSampler(
        len(records),
        cfg.SOLVER.IMS_PER_BATCH,
        groups=groups,
        accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
        seed=seed,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    mapper = Mapper(cfg, is_train=True)
    samples = SkippingDataset(
        records, mapper.read, mapper.transform, seed=seed, on_error=cfg.DATASETS.ON_ERROR
    )
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=trivial_batch_collator,
        **worker_options(cfg.DATALOADER.NUM_WORKERS),
    )


def build_test_loader(cfg: CfgNode, dataset: DetectionDataset) -> DataLoader:
    """The images of a test set, one at a time, split over the processes."""
    single_thread_opencv()
    return build_detection_test_loader(
        dataset.records,
        mapper=Mapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
