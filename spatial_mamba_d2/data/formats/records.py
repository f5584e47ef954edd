"""The three forms that labelled images of every format become."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.faults import Finding
from spatial_mamba_d2.data.imagenet import ClassifiedImage
from spatial_mamba_d2.data.label_format import LabelFormat
from spatial_mamba_d2.data.label_maps import Pair

TASKS = ("detection", "segmentation", "classification")
ALL = "all"  # name of the split of data that are not split


class UnusableDataError(ValueError):
    """The data are in no known format, or so broken that nothing can be said about single files."""


@dataclass(frozen=True)
class Instances:
    """Images with objects, as in a COCO file.

    Attributes:
        content: the lists ``images``, ``annotations`` and ``categories``. Of COCO files, as they
            are, whatever is wrong with them.
        image_root: the folder that ``file_name`` starts from, unless that is absolute.
        json_file: the file, if the data are in COCO format and the split is one file.
    """

    content: dict[str, list[Any]]
    image_root: Path
    json_file: Path | None = None

    def image_files(self) -> list[Path]:
        """The files of the images that have a name, whether they exist or not."""
        return [
            Path(self.image_root, image["file_name"])
            for image in self.content["images"]
            if isinstance(image, dict) and isinstance(image.get("file_name"), str)
        ]


Split = Instances | list[Pair] | list[ClassifiedImage]


@dataclass(frozen=True)
class LabelledData:
    """What :func:`~spatial_mamba_d2.data.formats.read_data` has read.

    Attributes:
        path: the folder or file.
        format: one of :data:`~.recognition.FORMATS`.
        task: one of :data:`TASKS`, which says what the splits hold: :class:`Instances`, pairs, or
            images with a class.
        classes: names by index.
        splits: ``train``, ``val`` and ``test``, as far as there are any, or only ``all``.
        findings: what was wrong with single files, and is left out.
        notes: how ambiguous things were understood, in a sentence each.
        labels: of label maps: what their values mean.
        split_rule: how the splits were made if the data have none; otherwise "".
    """

    path: Path
    format: str
    task: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    labels: LabelFormat | None = None
    split_rule: str = ""

    def image_files(self, split: str) -> list[Path]:
        """The files of a split's images, in its order."""
        items = self.splits[split]
        if isinstance(items, Instances):
            return items.image_files()
        return [item[0] for item in items]

    @property
    def num_images(self) -> int:
        return sum(len(self.image_files(split)) for split in self.splits)
