"""Data sets that Hugging Face's ``datasets`` has saved on disk (``save_to_disk``)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.coco_masks import short
from spatial_mamba_d2.data.faults import Finding
from spatial_mamba_d2.data.formats.instance_builder import (
    SPLIT_NAMES,
    InstanceBuilder,
    name_split,
)
from spatial_mamba_d2.data.formats.label_values import NameTable, decide
from spatial_mamba_d2.data.formats.records import ALL, LabelledData, Split, UnusableDataError
from spatial_mamba_d2.data.imagenet import ClassifiedImage
from spatial_mamba_d2.data.label_maps import Pair

_MASK_COLUMNS = ("mask", "label", "labels", "annotation", "segmentation_mask", "semantic_mask")
_SUFFIX_OF = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"II": ".tif", b"MM": ".tif"}


def is_saved(path: Path) -> bool:
    files = {file.name for file in path.iterdir()}
    return "dataset_dict.json" in files or {"dataset_info.json", "state.json"} <= files


def read_saved(path: Path, task: str | None, extract_to: Path | None) -> LabelledData:
    """Read a saved data set by its columns: images, and objects, masks or class labels.

    Images that are in the data set itself are written to ``extract_to``, because everything else
    reads files; images that it refers to stay where they are.

    Raises:
        ImportError: ``datasets`` is not installed.
        UnusableDataError: it cannot be read, or has no columns of these kinds.
        ValueError: ``extract_to`` is needed and None.
    """
    try:
        importlib.import_module("datasets.features")  # a folder datasets/ here has none
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"{path} needs the package datasets: pip install spatial-mamba-d2[formats] ({error})"
        ) from error
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever pyarrow and datasets raise
        raise UnusableDataError(f"{path}: datasets cannot read it: {error}") from error
    parts = dict(saved) if hasattr(saved, "keys") else {ALL: saved}
    parts = {name_split([name]): part for name, part in parts.items()}
    features = next(iter(parts.values())).features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise UnusableDataError(f"{path}: has no column of images, only {list(features)}")
    image = "image" if "image" in images else images[0]
    source = _Source(datasets, path, parts, image, extract_to)
    masks = [name for name in images if name != image and name in _MASK_COLUMNS]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if "objects" in features and task in (None, "detection"):
        return _read_objects(source, features["objects"])
    if masks and task in (None, "segmentation"):
        return _read_masks(source, masks[0])
    if labels and task in (None, "classification"):
        return _read_classes(source, labels[0], tuple(features[labels[0]].names))
    raise UnusableDataError(
        f"{path}: needs a column objects (detection), a second column of images (segmentation) or "
        f"a ClassLabel (classification), got {list(features)}"
    )


class _Source:
    """The rows of all splits, with their images as files."""

    def __init__(
        self, datasets: Any, path: Path, parts: dict[str, Any], image: str, extract_to: Path | None
    ):
        self.datasets, self.path, self.parts, self.image = datasets, path, parts, image
        self.extract_to = extract_to
        self.findings: list[Finding] = []

    def rows(self, *more_images: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Split, number and content of each row, with paths instead of images."""
        for split in (*SPLIT_NAMES, ALL):
            part = self.parts.get(split)
            if part is None:
                continue
            for column in (self.image, *more_images):
                part = part.cast_column(column, self.datasets.Image(decode=False))
            for number, row in enumerate(part):
                for column in (self.image, *more_images):
                    row[column] = self._file(row[column], split, column, number)
                if row[self.image] is not None:
                    yield split, number, row

    def _file(self, image: Any, split: str, column: str, number: int) -> Path | None:
        where = f"{self.path}, {split}, row {number}"
        content = image.get("bytes") if image else None
        name = image.get("path") if image else None
        if content is None:
            if name and Path(name).is_file():
                return Path(name)
            message = f"{where}: {column} is neither stored nor a file: {short(image)}"
            self.findings.append(Finding("missing image file", str(self.path), message))
            return None
        if self.extract_to is None:
            raise ValueError(
                f"{self.path} holds its images itself: a folder must be named to write them to"
            )
        suffix = _SUFFIX_OF.get(content[:2], Path(name or "").suffix or ".png")
        stem = Path(name).stem if name else f"{number:06d}"
        file = self.extract_to / split / column / f"{stem}{suffix}"
        if file.is_file() and file.read_bytes() != content:
            file = file.with_name(f"{number:06d}_{file.name}")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return file


def _read_objects(source: _Source, feature: Any) -> LabelledData:
    inner = getattr(feature, "feature", feature)  # List({...}), or a dict of lists
    fields = dict(inner) if hasattr(inner, "keys") else {}
    column = next((n for n in ("category", "category_id", "label", "labels") if n in fields), None)
    if "bbox" not in fields or column is None:
        raise UnusableDataError(
            f"{source.path}: objects need bbox and category, got {list(fields)}"
        )
    kind = getattr(fields[column], "feature", fields[column])
    names = list(getattr(kind, "names", None) or [])
    rows = list(source.rows())
    if not names:
        ids = sorted({c for _, _, row in rows for c, _ in _objects(row["objects"], column)})
        names = [str(id_) for id_ in range(max(ids, default=0) + 1)]
    builder = InstanceBuilder(names)
    for split, number, row in rows:
        sides = (row.get("height"), row.get("width"))
        size = sides if all(isinstance(side, int) for side in sides) else None
        image = builder.add_image(split, row[source.image], size)  # type: ignore[arg-type]
        for index, item in _objects(row["objects"], column):
            if not isinstance(index, int) or not 0 <= index < len(names):
                message = f"{source.path}, {split}, row {number}: no category {index!r}"
                source.findings.append(Finding("unknown class", str(row[source.image]), message))
                continue
            mask = item.get("segmentation") or None
            if mask and not isinstance(mask[0], list):
                mask = [mask]
            is_crowd = bool(item.get("iscrowd", item.get("is_crowd")))
            builder.add_object(
                split, image, names[index], box=item["bbox"], mask=mask, is_crowd=is_crowd
            )
    classes, splits = builder.build(SPLIT_NAMES)
    return LabelledData(source.path, "huggingface", "detection", classes, splits, source.findings)


def _objects(objects: Any, column: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Category and fields of each object, whether they are rows or columns."""
    if isinstance(objects, dict):
        keys = [key for key, value in objects.items() if isinstance(value, list)]
        rows = zip(*(objects[key] for key in keys), strict=True)
        objects = [dict(zip(keys, row, strict=True)) for row in rows]
    for item in objects or []:
        yield item[column], item


def _read_masks(source: _Source, column: str) -> LabelledData:
    splits: dict[str, Split] = {}
    pairs: list[Pair] = []
    for split, number, row in source.rows(column):
        if row[column] is None:
            message = f"{source.path}, {split}, row {number}: has no {column}"
            source.findings.append(Finding("image without label", str(row[source.image]), message))
            continue
        pair = Pair(row[source.image], row[column], row[source.image].stem)
        splits.setdefault(split, []).append(pair)  # type: ignore[union-attr, arg-type]
        pairs.append(pair)
    if not pairs:
        raise UnusableDataError(f"{source.path}: no image with a mask")
    table: NameTable | None = None
    classes, labels, meaning = decide(pairs, table, False)
    notes = [f"labels: {meaning}"]
    return LabelledData(
        source.path, "huggingface", "segmentation", classes, splits, source.findings, notes, labels
    )


def _read_classes(source: _Source, column: str, names: tuple[str, ...]) -> LabelledData:
    splits: dict[str, Split] = {}
    for split, number, row in source.rows():
        target = row[column]
        if not isinstance(target, int) or not 0 <= target < len(names):
            message = f"{source.path}, {split}, row {number}: no class {target!r}"
            source.findings.append(Finding("unknown class", str(row[source.image]), message))
            continue
        sample = ClassifiedImage(row[source.image], target)
        splits.setdefault(split, []).append(sample)  # type: ignore[union-attr, arg-type]
    return LabelledData(
        source.path, "huggingface", "classification", names, splits, source.findings
    )
