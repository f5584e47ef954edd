"""Test images with their truth: those of a run's configuration, or a folder in any format."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.config import flat_items
from spatial_mamba_d2.data.ade20k import check_split
from spatial_mamba_d2.data.ade20k import load_classes as load_label_classes
from spatial_mamba_d2.data.coco import CocoDataset, load_coco
from spatial_mamba_d2.data.formats import Instances, LabelledData
from spatial_mamba_d2.data.formats.training_files import write_training_files
from spatial_mamba_d2.data.imagenet import ClassifiedImage, load_classes, read_sample
from spatial_mamba_d2.data.imagenet import check_split as check_class_split
from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.label_format import LabelFormat, build_label_format
from spatial_mamba_d2.data.label_maps import Pair, read_pair
from spatial_mamba_d2.data.pair_files import Layout
from spatial_mamba_d2.prediction.results import category_id
from spatial_mamba_d2.system.yaml_file import parse_yaml


@dataclass
class TestSet:
    """Images to test a model on.

    Attributes:
        files: of the images.
        truth: detection: content of a COCO file whose category ids are indices plus 1, and whose
            image ids are positions plus 1. Segmentation: pairs. Classification: images with a
            class.
        where: what names it.
        labels: of segmentation.
    """

    __test__ = False

    files: list[Path]
    truth: Any
    where: str
    labels: LabelFormat | None = None

    def read(self, position: int, num_channels: int, value_range: Any) -> np.ndarray:
        """The image, ``uint8[H, W, C]``, as the task reads it in its evaluation."""
        if isinstance(self.truth, list) and isinstance(self.truth[0], ClassifiedImage):
            return np.asarray(read_sample(self.truth[position], value_range)[0])
        return read_image(self.files[position], num_channels, value_range)

    def label(self, position: int, num_channels: int, value_range: Any) -> np.ndarray:
        """Class indices of a pair, ``uint8[H, W]``."""
        assert self.labels is not None, "of segmentation"
        return read_pair(self.truth[position], self.labels, num_channels, value_range)[1]

    def fingerprint(self) -> str:
        """Equal for equal images with equal labels, wherever they are."""
        digest = hashlib.blake2b(digest_size=16)
        for file in self.files:
            digest.update(file.read_bytes())
        if isinstance(self.truth, dict):
            truth = {**self.truth, "images": [
                {k: v for k, v in i.items() if k != "file_name"} for i in self.truth["images"]
            ]}  # fmt: skip
            digest.update(json.dumps(truth, sort_keys=True, default=str).encode())
        else:
            for item in self.truth:
                is_pair = isinstance(item, Pair)
                digest.update(item.label.read_bytes() if is_pair else str(item.target).encode())
        return digest.hexdigest()


def of_configuration(task: str, cfg: Any, names: Sequence[str]) -> TestSet:
    """The test set that a configuration names; broken images are left out with a warning.

    Raises:
        FileNotFoundError, ValueError: there is none, or none is usable, or it has other classes.
    """
    data = cfg.DATASETS
    if not data.TEST:
        raise ValueError("the run's configuration has no test set (DATASETS.TEST); name --data")
    if task == "detection":
        files, folders = data.TEST_JSON, data.TEST_IMAGES
        if not files or not isinstance(files, str) or not isinstance(folders, str):
            raise ValueError(
                f"DATASETS.TEST_JSON must be one file for a report, got {files!r}; name --data"
            )
        return _instances(load_coco(files, folders, on_error="skip"), names, files)
    if task == "segmentation":
        classes = load_label_classes(data.CLASSES, data.ROOT, cfg.MODEL.NUM_CLASSES)
        _check_names(classes.names, names, data.ROOT)
        labels = build_label_format(
            classes.names, data.LABEL_OFFSET, data.IGNORE_LABELS, data.LABEL_MAP, data.ROOT
        )
        layout = Layout(data.IMAGE_FOLDER, data.LABEL_FOLDER, data.IMAGE_SUFFIX, data.LABEL_SUFFIX)
        pairs = check_split(
            data.ROOT, data.TEST, labels, layout=layout, on_error="skip",
            num_channels=cfg.INPUT.CHANNELS,
        ).pairs  # fmt: skip
        return TestSet([p.image for p in pairs], pairs, f"{data.ROOT}, {data.TEST}", labels)
    names_in_data = load_classes(data.CLASSES, data.ROOT, data.TRAIN, cfg.MODEL.NUM_CLASSES)
    _check_names(names_in_data, names, data.ROOT)
    samples = check_class_split(
        data.ROOT, data.TEST, names_in_data, on_error="skip", check_decode=True
    ).samples
    return TestSet([s.path for s in samples], samples, f"{data.ROOT}, {data.TEST}")


def of_data(data: LabelledData, names: Sequence[str], folder: Path) -> TestSet:
    """The test images of data in any format: ``val``, else ``test``, else all.

    Args:
        names: of the model's classes, which those of the data must be among.
        folder: for small files.
    """
    split = next(s for s in ("val", "test", *data.splits) if s in data.splits)
    where = f"{data.path}, {split}"
    items = data.splits[split]
    if isinstance(items, Instances):
        file, image_root = items.json_file, items.image_root
        if file is None:
            both = LabelledData(data.path, data.format, data.task, data.classes,
                                {"train": items, "val": items})  # fmt: skip
            file = Path(write_training_files(both, folder)["DATASETS.TEST_JSON"])
        return _instances(load_coco(file, image_root, on_error="skip"), names, where)
    _check_names(data.classes, names, where)
    return TestSet([item[0] for item in items], list(items), where, data.labels)


def _instances(coco: CocoDataset, names: Sequence[str], where: str) -> TestSet:
    index = {name: k for k, name in enumerate(names)}
    unknown = [name for _, name in coco.categories if name not in index]
    used = {a["category_id"] for r in coco.records for a in r["annotations"]}
    of_id = dict(coco.categories)
    if missing := [of_id[id_] for id_ in sorted(used) if of_id[id_] in unknown]:
        raise ValueError(
            f"{where}: the model has no class {missing[0]!r}; its classes are "
            f"{', '.join(list(names)[:20])}"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, record in enumerate(coco.records, start=1):
        images.append({"id": number, "file_name": record["file_name"], "height": record["height"],
                       "width": record["width"]})  # fmt: skip
        for a in record["annotations"]:
            id_ = category_id(index[of_id[a["category_id"]]])
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": id_}
            annotations.append({**a, **entry})
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id(k), "name": name} for k, name in enumerate(names)],
    }
    return TestSet([Path(r["file_name"]) for r in coco.records], truth, where)


def _check_names(data: Sequence[str], model: Sequence[str], where: object) -> None:
    if list(data) != list(model):
        raise ValueError(
            f"{where}: classes must be those of the model in their order: "
            f"{', '.join(list(model)[:10])}; got {', '.join(list(data)[:10])}"
        )


def load_configuration(task: str, recorded: str | Path | None, text: str | None) -> Any:
    """The configuration of a run: its file, or what the checkpoint holds.

    Raises:
        ValueError: there is none.
    """
    load = importlib.import_module(f"spatial_mamba_d2.{task}.config").load_config
    if recorded is not None:
        return load(recorded, ["MODEL.WEIGHTS", ""])
    if text is None:
        raise ValueError("there is no config.yaml next to the weights; name --data")
    pairs = flat_items(parse_yaml(text.encode(), "the checkpoint's configuration"))
    return load(None, [word for pair in pairs for word in pair])
