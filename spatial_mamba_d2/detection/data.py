"""Training and test images of detection: any data in COCO format, checked before training."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    Metadata,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from spatial_mamba_d2.data.coco import CocoDataset, load_coco
from spatial_mamba_d2.data.faults import reading_fault, settle_faults
from spatial_mamba_d2.data.images import read_size
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.data.samplers import ResumableBatchSampler, SkippingDataset
from spatial_mamba_d2.detection.classes import (
    category_ids,
    check_num_classes,
    match_classes,
    merge_classes,
    require_equal_classes,
)
from spatial_mamba_d2.detection.keypoints import Keypoints, count_visible, read_keypoints
from spatial_mamba_d2.detection.mapper import Mapper, Record
from spatial_mamba_d2.detection.unused_keys import is_panoptic
from spatial_mamba_d2.prediction.sources import find_sources
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.missing import no_such
from spatial_mamba_d2.system.workers import single_thread_opencv, worker_options

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
        coco: what was read from that file if pycocotools cannot read the same from it.
        keypoints: if MODEL.KEYPOINT_ON.
    """

    name: str
    records: list[Record]
    classes: list[str] | None
    category_ids: list[int] = field(default_factory=list)
    json_file: str | None = None
    coco: CocoDataset | None = None
    keypoints: Keypoints | None = None


def register_json_datasets(cfg: CfgNode) -> None:
    """Register ``DATASETS.{TRAIN,TEST}_{JSON,IMAGES,SEM_SEG}`` with Detectron2, under a name each.

    Each of them is one file or folder, or a list; the names take the place of those in
    ``DATASETS.TRAIN`` and ``DATASETS.TEST``; ``cfg`` must not be frozen.

    Raises:
        ValueError: the numbers of files and folders differ, or label maps are missing that
            panoptic segmentation needs.
    """
    for split in ("TRAIN", "TEST"):
        files, folders = _paths(cfg, f"{split}_JSON"), _paths(cfg, f"{split}_IMAGES")
        if bool(files) != bool(folders):
            raise ValueError(
                f"DATASETS.{split}_JSON and DATASETS.{split}_IMAGES must be given together, "
                f"got {_shown(files)} and {_shown(folders)}"
            )
        folders = _one_for_each(folders, files, split, "IMAGES")
        semantic = _paths(cfg, f"{split}_SEM_SEG")
        if bool(semantic) != bool(files and is_panoptic(cfg)):
            raise ValueError(
                f"DATASETS.{split}_SEM_SEG must be given with DATASETS.{split}_JSON for "
                f"MODEL.META_ARCHITECTURE PanopticFPN, got {_shown(semantic)} and {_shown(files)}"
            )
        semantic = _one_for_each(semantic or [""], files, split, "SEM_SEG")
        names = []
        for json_file, images, labels in zip(files, folders, semantic, strict=True):
            json_file, images = str(Path(json_file).resolve()), str(Path(images).resolve())
            more = {"sem_seg_root": str(Path(labels).resolve())} if labels else {}
            names.append(f"{json_file} of {images}" + "".join(f" with {p}" for p in more.values()))
            MetadataCatalog.get(names[-1]).set(
                json_file=json_file, image_root=images, evaluator_type="coco", **more
            )
        if len(set(names)) < len(names):
            raise ValueError(f"DATASETS.{split}_JSON names a file twice: {_shown(files)}")
        if names:
            cfg.DATASETS[split] = tuple(names)


def _paths(cfg: CfgNode, key: str) -> list[str]:
    value = cfg.DATASETS[key]
    return [value] if value and isinstance(value, str) else list(value)


def _one_for_each(folders: list[str], files: list[str], split: str, what: str) -> list[str]:
    if len(folders) == 1:
        folders = folders * len(files)
    if len(files) != len(folders):
        raise ValueError(
            f"DATASETS.{split}_{what} must be one folder for all files in "
            f"DATASETS.{split}_JSON, or one for each of the {len(files)}, got {len(folders)}"
        )
    return folders


def _shown(paths: list[str]) -> str:
    return ", ".join(map(repr, paths)) or "''"


def load_dataset(
    cfg: CfgNode, name: str, *, is_train: bool, classes: Sequence[str] | None = None
) -> DetectionDataset:
    """The data set that Detectron2 knows as ``name``.

    One in COCO format is checked as it is read; others come from Detectron2's catalogue as they
    are. In training, images without an object are left out if
    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` says so.

    Args:
        classes: of the detector, by which the data set's are matched; None: those of the data set.

    Raises:
        FileNotFoundError: the json is missing.
        ValueError: broken images or annotations, an empty data set, other classes, or a number of
            classes that the detector does not have.
    """
    return _build(cfg, _read(cfg, name, is_train), is_train, classes)


def load_training_datasets(cfg: CfgNode) -> list[DetectionDataset]:
    """The data sets in ``DATASETS.TRAIN``, with the same classes, which are matched by name.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_dataset`; ValueError also for none at all.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN must name at least one data set, got none")
    sources = [_read(cfg, name, is_train=True) for name in cfg.DATASETS.TRAIN]
    classes = None
    if len(sources) > 1 and all(source.classes for source in sources):
        classes = merge_classes((source.name, source.classes or ()) for source in sources)
    datasets = [_build(cfg, source, True, classes) for source in sources]
    if cfg.DATASETS.TRAIN_NEGATIVES:
        datasets.append(read_negatives(cfg, datasets[0].classes))
    return datasets


def read_negatives(cfg: CfgNode, classes: list[str] | None) -> DetectionDataset:
    """The images without objects of ``DATASETS.TRAIN_NEGATIVES``, each ``NEGATIVES_REPEAT`` times.

    Raises:
        FileNotFoundError: something does not exist.
        ValueError: an image cannot be read, and ``DATASETS.ON_ERROR`` is ``raise``.
    """
    key = "DATASETS.TRAIN_NEGATIVES"
    files = find_sources(_paths(cfg, "TRAIN_NEGATIVES"), key=key)
    value_range = build_pixel_range(cfg.INPUT.PIXEL_RANGE)
    records: list[Record] = []
    faults = []
    for file in files:
        try:
            height, width = read_size(file, cfg.INPUT.CHANNELS, value_range)
        except ValueError as error:
            faults.append(reading_fault("broken image", error))
            continue
        record = {"file_name": str(file), "height": height, "width": width, "annotations": []}
        records.append({**record, "image_id": str(file)})
    settle_faults(faults, cfg.DATASETS.ON_ERROR, where=key, num_usable=len(records))
    logger.info(
        "%s: %d images without objects, %d times", key, len(records), cfg.DATASETS.NEGATIVES_REPEAT
    )
    return DetectionDataset(key, records * cfg.DATASETS.NEGATIVES_REPEAT, classes)


def _read(cfg: CfgNode, name: str, is_train: bool) -> DetectionDataset:
    """The data set with its own classes, not yet in Detectron2's format if it is a file."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        if name not in DatasetCatalog:
            raise ValueError(
                f"no data set is registered as {name!r}: DATASETS.TRAIN_JSON and _IMAGES, and "
                "DATASETS.TEST_JSON and _IMAGES, name files of your own"
            )
        records = list(DatasetCatalog.get(name))
        return DetectionDataset(name, records, metadata.get("thing_classes"))
    json_file = metadata.json_file
    try:
        coco = load_coco(
            json_file,
            metadata.image_root,
            on_error=cfg.DATASETS.ON_ERROR,
            check_decode=cfg.DATASETS.ON_ERROR == "skip" and not is_train,
            num_channels=cfg.INPUT.CHANNELS,
            value_range=build_pixel_range(cfg.INPUT.PIXEL_RANGE),
        )
    except FileNotFoundError as error:
        split = "TRAIN" if is_train else "TEST"
        raise FileNotFoundError(
            f"{error} (of DATASETS.{split} {name!r}; DATASETS.{split}_JSON and "
            f"DATASETS.{split}_IMAGES name other data{_WITHOUT_TEST if not is_train else ''})"
        ) from None
    return DetectionDataset(
        name, [], [name for _, name in coco.categories], json_file=json_file, coco=coco
    )


_WITHOUT_TEST = ", and DATASETS.TEST () trains without evaluation"


def _build(
    cfg: CfgNode, source: DetectionDataset, is_train: bool, classes: Sequence[str] | None
) -> DetectionDataset:
    """What :func:`_read` gave, in Detectron2's format and with the classes of the detector."""
    dataset = source
    if source.coco and source.json_file:
        dataset = _build_coco(cfg, source, source.coco, source.json_file, classes)
        if is_train:
            _note_mask_format(cfg, dataset)
    else:
        require_equal_classes(source.name, source.classes, classes)
    if not is_train:
        return dataset
    num_images = len(dataset.records)
    kept = dataset.records
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        kept = [r for r in kept if any(not a["iscrowd"] for a in r["annotations"])]
        if not kept:
            num_crowds = sum(len(r["annotations"]) for r in dataset.records)
            crowds = f": all {num_crowds} annotations are crowds" if num_crowds else ""
            raise ValueError(
                f"data set {source.name}: none of its {num_images} images has an object{crowds}"
            )
        logger.info("%s: %d of %d images have objects", source.name, len(kept), num_images)
    if cfg.MODEL.KEYPOINT_ON:
        least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        with_keypoints = [r for r in kept if count_visible(r) >= least]
        logger.info("%s: %d of %d images have %d keypoints or more "
                    "(MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)",
                    source.name, len(with_keypoints), len(kept), least)  # fmt: skip
        if not (kept := with_keypoints):
            raise ValueError(f"data set {source.name}: no image has {least} keypoints")
    return replace(dataset, records=kept)


def _build_coco(
    cfg: CfgNode,
    source: DetectionDataset,
    coco: CocoDataset,
    json_file: str,
    classes: Sequence[str] | None,
) -> DetectionDataset:
    names = list(classes) if classes is not None else [name for _, name in coco.categories]
    check_num_classes(cfg, names, json_file)
    ids = match_classes(coco, names, json_file)
    is_changed = coco.is_changed or len(ids) != len(names)
    is_changed |= len(ids) != len(coco.categories)
    if cfg.MODEL.MASK_ON:
        is_changed |= _require_masks(cfg, coco, json_file)
    keypoints = None
    if cfg.MODEL.KEYPOINT_ON:
        keypoints, completed = read_keypoints(cfg, coco, json_file)
        is_changed |= completed
    records = _to_detectron2(cfg, coco, ids)
    if is_panoptic(cfg):
        _add_label_maps(records, source.name)
    return replace(
        source,
        records=records,
        classes=names,
        category_ids=category_ids(ids, len(names)),
        coco=coco if is_changed else None,
        keypoints=keypoints,
    )


def _add_label_maps(records: list[Record], name: str) -> None:
    """The label map of each image, under its path in the folder of images, as a PNG.

    Raises:
        FileNotFoundError: there are images without one.
    """
    metadata = MetadataCatalog.get(name)
    for record in records:
        place = Path(os.path.relpath(record["file_name"], metadata.image_root))
        record["sem_seg_file_name"] = str(Path(metadata.sem_seg_root, place.with_suffix(".png")))
    absent = [r["sem_seg_file_name"] for r in records if not os.path.isfile(r["sem_seg_file_name"])]
    if absent:
        what = f"label maps of {len(absent)} of {len(records)} images are missing, the first"
        raise no_such(what, absent[0])


def _require_masks(cfg: CfgNode, coco: CocoDataset, json_file: str) -> bool:
    """Leave out annotations without a mask if ``DATASETS.ON_ERROR`` says so; whether there are any.

    Raises:
        ValueError: there are some, or there are no others.
    """
    without = [
        (record, annotation)
        for record in coco.records
        for annotation in record["annotations"]
        if annotation.get("segmentation") is None
    ]
    if not without:
        return False
    number = sum(len(record["annotations"]) for record in coco.records)
    record, annotation = without[0]
    message = (
        f"{json_file}: {len(without)} of {number} annotations have no segmentation, the first: "
        f"annotation {annotation['id']} of image {record['image_id']}"
    )
    if len(without) == number:
        raise ValueError(f"{message}: MODEL.MASK_ON False trains and evaluates boxes only")
    if cfg.DATASETS.ON_ERROR == "raise":
        raise ValueError(
            f"{message}: MODEL.MASK_ON False trains and evaluates boxes only, and "
            "DATASETS.ON_ERROR skip leaves these annotations out"
        )
    logger.warning("%s; skipped", message)
    for record, annotation in without:
        record["annotations"].remove(annotation)
    return True


def _note_mask_format(cfg: CfgNode, dataset: DetectionDataset) -> None:
    if not cfg.MODEL.MASK_ON or cfg.INPUT.MASK_FORMAT != "polygon":
        return
    number = sum(
        isinstance(annotation.get("segmentation"), dict) and not annotation["iscrowd"]
        for record in dataset.records
        for annotation in record["annotations"]
    )
    if number:
        logger.info("%s: %d masks are RLE: their images train on bitmasks, whatever "
                    "INPUT.MASK_FORMAT is", dataset.json_file, number)  # fmt: skip


def _to_detectron2(cfg: CfgNode, coco: CocoDataset, ids: dict[int, int]) -> list[Record]:
    """The images and annotations.

    Args:
        ids: of the categories -> index of the class.
    """
    records = []
    for image in coco.records:
        annotations = []
        for annotation in image["annotations"]:
            converted = {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": ids[annotation["category_id"]],
                "iscrowd": annotation["iscrowd"],
            }
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
                segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
            if segmentation is not None:
                converted["segmentation"] = segmentation
            if cfg.MODEL.KEYPOINT_ON:
                # COCO counts pixels, Detectron2 measures from the image's edge.
                converted["keypoints"] = [
                    value if position % 3 == 2 else value + 0.5
                    for position, value in enumerate(annotation["keypoints"])
                ]
            annotations.append(converted)
        records.append({**image, "annotations": annotations})
    return records


def register_for_evaluation(cfg: CfgNode, dataset: DetectionDataset) -> Metadata:
    """Detectron2's metadata by which predictions for ``dataset`` are evaluated; in all processes.

    What was changed or skipped when the file was read is evaluated in the same way: it is then
    written to ``OUTPUT_DIR``, by one process per machine, for pycocotools to read.
    """
    if dataset.json_file is None:
        return MetadataCatalog.get(dataset.name)
    json_file = dataset.json_file
    if dataset.coco:
        several = len(cfg.DATASETS.TEST) > 1 and dataset.name in cfg.DATASETS.TEST
        number = f"{cfg.DATASETS.TEST.index(dataset.name) + 1}_" if several else ""
        path = Path(cfg.OUTPUT_DIR, f"cleaned_{number}{Path(json_file).stem}.json")
        if comm.get_local_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(_to_coco(dataset)), encoding="utf-8")
        json_file = str(path)
    comm.synchronize()  # in all processes, even if only one machine's copy has faults
    name = f"{dataset.name} (evaluation)"
    in_file = sorted(zip(dataset.category_ids, dataset.classes or (), strict=True))
    if name in MetadataCatalog.list():  # entry of the previous evaluation, whose file may differ
        MetadataCatalog.pop(name)
    return MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=MetadataCatalog.get(dataset.name).image_root,
        evaluator_type="coco",
        thing_classes=[name for _, name in in_file],  # in the order of pycocotools' scores
        thing_dataset_id_to_contiguous_id={id_: i for i, id_ in enumerate(dataset.category_ids)},
    )


def drawing_metadata(evaluated: Metadata, dataset: DetectionDataset) -> Metadata:
    """What :func:`register_for_evaluation` gave, with the names of the classes by their index."""
    if dataset.json_file is None:
        return evaluated
    return Metadata(**{**evaluated.as_dict(), "thing_classes": dataset.classes})


def _to_coco(dataset: DetectionDataset) -> dict[str, Any]:
    assert dataset.coco
    names = zip(dataset.category_ids, dataset.classes or (), strict=True)
    records = dataset.coco.records
    return {
        "info": {},
        "licenses": [],
        "categories": [{"id": id_, "name": name} for id_, name in names],
        "images": [
            {"id": r["image_id"], **{key: r[key] for key in ("file_name", "height", "width")}}
            for r in records
        ],
        "annotations": [annotation for r in records for annotation in r["annotations"]],
    }


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
    flips = datasets[0].keypoints.flip_indices if datasets[0].keypoints else None
    mapper = Mapper(cfg, is_train=True, flip_indices=flips)
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
