"""What the checks of labelled images have found, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_mamba_d2.data.faults import MAX_SHOWN, Finding
from spatial_mamba_d2.data.formats import LabelledData
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.tables import console_table


@dataclass
class SplitCounts:
    """How much a split holds.

    Attributes:
        num_images: that are usable.
        num_objects: objects, without crowds; labelled pixels of label maps; images of classes.
        by_class: of each class, the same.
        images_by_class: images that have the class.
        objects_an_image: number of objects -> number of images.
        object_px: sides of the objects, the square root of their boxes' areas.
    """

    num_images: int = 0
    num_objects: int = 0
    by_class: list[int] = field(default_factory=list)
    images_by_class: list[int] = field(default_factory=list)
    objects_an_image: Counter[int] = field(default_factory=Counter)
    object_px: list[float] = field(default_factory=list)


@dataclass
class DataReport:
    """All that was found.

    Attributes:
        data: what was checked.
        counts: split -> how much it holds.
        findings: what is wrong, the same kinds together.
        notes: what is worth knowing, and no fault.
        image_sizes: height and width -> number of images.
    """

    data: LabelledData
    counts: Mapping[str, SplitCounts]
    findings: list[Finding]
    notes: list[str]
    image_sizes: Counter[tuple[int, int]]

    @property
    def num_images(self) -> int:
        return sum(count.num_images for count in self.counts.values())

    @property
    def num_objects(self) -> int:
        """Objects, or labelled images in the other tasks."""
        if self.data.task == "detection":
            return sum(count.num_objects for count in self.counts.values())
        return self.num_images

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.data.path.absolute()),
            "format": self.data.format,
            "task": self.data.task,
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "classes": list(self.data.classes),
            "splits": {
                split: {
                    "num_images": count.num_images,
                    "num_objects": count.num_objects,
                    "by_class": count.by_class,
                    "images_by_class": count.images_by_class,
                    "objects_an_image": {str(k): v for k, v in
                                         sorted(count.objects_an_image.items())},
                }
                for split, count in self.counts.items()
            },
            "findings": [
                {"kind": f.kind, "file": f.file, "message": f.message} for f in self.findings
            ],
            "notes": self.notes,
        }  # fmt: skip

    def write_json(self, path: Path) -> None:
        write_json(path, self.as_json())

    def text(self) -> str:
        """Counts, notes and the first findings of each kind, for a console."""
        task = self.data.task
        lines = [f"{self.data.path}: {self.data.format}, {task}"]
        unit = {"detection": "objects", "segmentation": "labelled pixels"}.get(task, "images")
        rows = [
            (split, f"{count.num_images:,}", f"{count.num_objects:,}")
            for split, count in self.counts.items()
        ]
        lines += ["", console_table(("split", "images", unit), rows)]
        lines += ["", self.class_table(unit)]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        for kind, found in by_kind(self.findings).items():
            lines += ["", f"{kind}: {len(found)}"]
            lines += [f"  {finding.message}" for finding in found[:MAX_SHOWN]]
            if len(found) > MAX_SHOWN:
                lines.append(f"  and {len(found) - MAX_SHOWN} more")
        lines += ["", f"findings: {len(self.findings)}"]
        return "\n".join(lines)

    def class_table(self, unit: str) -> str:
        """A row for each class and a column for each split."""
        header = ("class", *(f"{split}: {unit}" for split in self.counts))
        rows = [
            (name, *(f"{count.by_class[index]:,}" for count in self.counts.values()))
            for index, name in enumerate(self.data.classes)
        ]
        return console_table(header, rows)


def by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """In the order in which kinds come first."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    return kinds


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
