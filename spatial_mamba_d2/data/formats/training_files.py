"""Small files by which the training tools read data of any format; no image is copied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.faults import MAX_SHOWN
from spatial_mamba_d2.data.formats.records import Instances, LabelledData
from spatial_mamba_d2.data.imagenet import ClassifiedImage
from spatial_mamba_d2.data.label_format import LabelFormat
from spatial_mamba_d2.data.label_maps import Pair
from spatial_mamba_d2.system.atomic import replacing

CLASS_FILE, LABEL_FILE, RECORD = "classes.txt", "label_map.txt", "data.json"


def write_training_files(data: LabelledData, folder: str | Path) -> dict[str, Any]:
    """Write lists or COCO files with absolute paths, and ``data.json``, which says what they are.

    COCO files that have splits are used where they are.

    Args:
        data: with the splits ``train`` and ``val``, see :func:`~.splitting.split_data`.
        folder: of the run, is created if needed.

    Returns:
        configuration keys of the task, ``DATASETS.*`` and the number of classes, and their values.

    Raises:
        ValueError: a split is missing, or a name has a tab or line break.
        OSError: a file cannot be written.
    """
    folder = Path(folder).absolute()
    if missing := [split for split in ("train", "val") if split not in data.splits]:
        raise ValueError(f"{data.path}: has no split {missing[0]}; it has {', '.join(data.splits)}")
    folder.mkdir(parents=True, exist_ok=True)
    write = {
        "detection": _write_instances,
        "segmentation": _write_label_maps,
        "classification": _write_classes,
    }[data.task]
    keys = write(data, folder)
    record = {
        "path": str(data.path.absolute()),
        "format": data.format,
        "task": data.task,
        "split": data.split_rule or "as in the data",
        "classes": list(data.classes),
        "num_images": {split: len(data.image_files(split)) for split in data.splits},
        "left_out": len(data.findings),
        "left_out_first": [finding.message for finding in data.findings[:MAX_SHOWN]],
        "notes": data.notes,
        "keys": keys,
    }
    _write(folder / RECORD, json.dumps(record, indent=1))
    return keys


def _write_instances(data: LabelledData, folder: Path) -> dict[str, Any]:
    keys: dict[str, Any] = {"MODEL.ROI_HEADS.NUM_CLASSES": len(set(data.classes))}
    for split, name in (("train", "TRAIN"), ("val", "TEST")):
        part = data.splits[split]
        assert isinstance(part, Instances), "of detection"
        file, image_root = part.json_file, part.image_root
        if file is None:
            file = folder / f"{split}.json"
            _write(file, json.dumps({"info": {}, "licenses": [], **_absolute(part)}))
        keys[f"DATASETS.{name}_JSON"] = str(file.absolute())
        keys[f"DATASETS.{name}_IMAGES"] = str(image_root.absolute())
    keys["MODEL.MASK_ON"] = all(map(_has_masks, data.splits.values()))
    return keys


def _absolute(part: Instances) -> dict[str, list[Any]]:
    images = [{**i, "file_name": str(Path(part.image_root, i["file_name"]).absolute())}
              if isinstance(i, dict) and isinstance(i.get("file_name"), str) else i
              for i in part.content["images"]]  # fmt: skip
    return {**part.content, "images": images}


def _has_masks(part: Any) -> bool:
    annotations = [a for a in part.content["annotations"] if isinstance(a, dict)]
    return bool(annotations) and all(a.get("segmentation") for a in annotations)


def _write_label_maps(data: LabelledData, folder: Path) -> dict[str, Any]:
    for split in ("train", "val"):
        pairs = [pair for pair in data.splits[split] if isinstance(pair, Pair)]  # type: ignore[union-attr]
        _write_rows(folder / f"{split}.txt", [(p.image.absolute(), p.label.absolute())
                                              for p in pairs])  # fmt: skip
    _write_rows(folder / CLASS_FILE, [(name,) for name in data.classes])
    assert data.labels is not None, "label maps have a format"
    keys = {
        "DATASETS.ROOT": str(folder),
        "DATASETS.TRAIN": "train.txt",
        "DATASETS.TEST": "val.txt",
        "DATASETS.IMAGE_FOLDER": ".",
        "DATASETS.LABEL_FOLDER": ".",
        "DATASETS.CLASSES": CLASS_FILE,
        "MODEL.NUM_CLASSES": len(data.classes),
    }
    if not data.labels.is_map:
        return {
            **keys,
            "DATASETS.LABEL_OFFSET": data.labels.offset,
            "DATASETS.IGNORE_LABELS": data.labels.ignored,
        }
    _write(folder / LABEL_FILE, "\n".join(_label_entries(data.labels)) + "\n")
    return {**keys, "DATASETS.LABEL_MAP": LABEL_FILE}


def _label_entries(labels: LabelFormat) -> list[str]:
    """The lines of a file that ``DATASETS.LABEL_MAP`` names."""

    def meaning(index: int) -> str:
        return "ignore" if index == labels.ignore else str(index)

    entries = [f"{value}: {meaning(index)}" for value, index in labels.values]
    entries += [f"#{color:06x}: {meaning(index)}" for color, index in labels.colors]
    return entries + ([] if labels.other is None else [f"*: {meaning(labels.other)}"])


def _write_classes(data: LabelledData, folder: Path) -> dict[str, Any]:
    for split in ("train", "val"):
        samples = [s for s in data.splits[split] if isinstance(s, ClassifiedImage)]  # type: ignore[union-attr]
        rows = [(sample.path.absolute(), data.classes[sample.target]) for sample in samples]
        _write_rows(folder / f"{split}.txt", rows)
    _write_rows(folder / CLASS_FILE, [(name,) for name in data.classes])
    return {
        "DATASETS.ROOT": str(folder),
        "DATASETS.TRAIN": "train.txt",
        "DATASETS.TEST": "val.txt",
        "DATASETS.CLASSES": CLASS_FILE,
        "MODEL.NUM_CLASSES": len(data.classes),
    }


def _write_rows(file: Path, rows: Sequence[tuple[object, ...]]) -> None:
    for row in rows:
        if any("\t" in str(cell) or "\n" in str(cell) for cell in row):
            raise ValueError(f"names of files and classes must have no tab or line break: {row}")
    _write(file, "".join("\t".join(map(str, row)) + "\n" for row in rows))


def _write(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
