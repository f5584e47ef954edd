"""Which formats the content of a folder or file is in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spatial_mamba_d2.data.formats.class_folders import read_class_folders, split_folders
from spatial_mamba_d2.data.formats.coco_files import is_coco, read_coco
from spatial_mamba_d2.data.formats.huggingface import is_saved, read_saved
from spatial_mamba_d2.data.formats.label_trees import find_tree, read_label_tree
from spatial_mamba_d2.data.formats.labelme import is_labelme, read_labelme
from spatial_mamba_d2.data.formats.records import LabelledData
from spatial_mamba_d2.data.formats.voc import read_voc
from spatial_mamba_d2.data.formats.yolo import is_data_yaml, read_yolo
from spatial_mamba_d2.data.images import SUFFIXES, files_below
from spatial_mamba_d2.data.json_file import read_json

FORMATS = {
    "coco": "COCO's JSON, one file for each split or one for all",
    "yolo": "YOLO's text files of boxes or polygons",
    "labelme": "labelme's JSON, one file for each image",
    "voc": "Pascal VOC's XML files with boxes, or its label maps",
    "ade20k": "images and label maps in images/SPLIT and annotations/SPLIT",
    "masks": "images and label maps in other folders",
    "class_folders": "a folder of images for each class",
    "huggingface": "a data set that Hugging Face's datasets has saved",
}
_PER_FOLDER = 3  # JSON, XML and text files of a folder that are looked at
_YOLO_LINE = re.compile(rb"\s*\d+(\s+-?[\d.eE+-]+){4,}\s*(\r?\n|$)")
_HEAD = 1 << 16  # bytes


class Candidate(NamedTuple):
    """A format that data may be in, its task, and what reads them."""

    format: str
    task: str
    read: Callable[[], LabelledData]


def recognise(
    path: Path, *, task: str | None = None, extract_to: Path | None = None
) -> list[Candidate]:
    """The formats that ``path`` is in, the most specific one first.

    Args:
        path: a folder, or the file of a format that has one: COCO's JSON, YOLO's YAML.
        task: leave out formats of other tasks.
        extract_to: see :func:`~.huggingface.read_saved`.
    """
    found = list(_candidates(path, task, extract_to))
    return [c for c in found if task is None or c.task == task]


def _candidates(path: Path, task: str | None, extract_to: Path | None) -> Iterable[Candidate]:
    if path.is_file():
        if path.suffix.lower() in (".yaml", ".yml"):
            yield Candidate("yolo", "detection", partial(read_yolo, path.parent, path))
        else:
            yield Candidate("coco", "detection", partial(read_coco, path, [path]))
        return
    if is_saved(path):
        for kind in (task,) if task else ("detection", "segmentation", "classification"):
            yield Candidate("huggingface", kind, partial(read_saved, path, task, extract_to))
        return
    files = files_below(path)
    yaml_files = [f for f in files if f.suffix.lower() in (".yaml", ".yml") and is_data_yaml(f)]
    if yaml_files:
        nearest = min(yaml_files, key=lambda file: len(file.parts))
        yield Candidate("yolo", "detection", partial(read_yolo, path, nearest))
    coco, num_labelme = _look_at_json(files)
    if coco:
        yield Candidate("coco", "detection", partial(read_coco, path, coco))
    if num_labelme:
        yield Candidate("labelme", "detection", partial(read_labelme, path))
    if any(_is_voc(file) for file in _sample(files, ".xml")):
        yield Candidate("voc", "detection", partial(read_voc, path))
    if not yaml_files and any(_is_yolo(file) for file in _sample(files, ".txt")):
        yield Candidate("yolo", "detection", partial(read_yolo, path, None))
    if tree := find_tree(path):
        name = "masks"
        if "SegmentationClass" in tree.layout.label_folder:
            name = "voc"
        elif tree.layout.label_folder == "annotations/{split}":
            name = "ade20k"
        yield Candidate(name, "segmentation", partial(read_label_tree, path, tree, name))
    elif _has_class_folders(path):
        yield Candidate("class_folders", "classification", partial(read_class_folders, path))


def _sample(files: Iterable[Path], suffix: str) -> list[Path]:
    chosen: list[Path] = []
    numbers: dict[Path, int] = {}
    for file in files:
        if file.suffix.lower() == suffix and numbers.get(file.parent, 0) < _PER_FOLDER:
            numbers[file.parent] = numbers.get(file.parent, 0) + 1
            chosen.append(file)
    return chosen


def _look_at_json(files: Iterable[Path]) -> tuple[list[Path], int]:
    """COCO's files, and how many of a sample are labelme's."""
    coco, num_labelme = [], 0
    for file in _sample(files, ".json"):
        try:
            content = read_json(file)
        except ValueError:  # cut off: what it was meant to be
            with file.open("rb") as opened:
                head = opened.read(_HEAD)
            num_labelme += b'"shapes"' in head
            if b'"shapes"' not in head and re.search(rb'"(images|annotations)"\s*:', head):
                coco.append(file)
            continue
        num_labelme += is_labelme(content)
        if is_coco(content):
            coco.append(file)
    return coco, num_labelme


def _is_voc(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"<annotation" in opened.read(_HEAD)


def _is_yolo(file: Path) -> bool:
    with file.open("rb") as opened:
        return bool(_YOLO_LINE.match(opened.read(_HEAD)))


def _has_class_folders(path: Path) -> bool:
    folder = next(iter(split_folders(path).values()))
    with_images = [
        f for f in folder.iterdir()
        if f.is_dir() and any(x.suffix.lower() in SUFFIXES for x in files_below(f))
    ]  # fmt: skip
    return len(with_images) >= 2
