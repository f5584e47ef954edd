"""What the checks of a COCO file find, in a form that can be remembered as JSON."""

from __future__ import annotations

from typing import Any, TypedDict

from spatial_mamba_d2.data.coco_masks import short
from spatial_mamba_d2.data.faults import Fault

# Sections of the file -> what an entry of each is called.
SECTIONS = {"images": "image", "annotations": "annotation", "categories": "category"}


class Findings(TypedDict):
    """What is remembered of a file, as JSON.

    Attributes:
        faults: section and position of each entry that is not usable, kind and reason.
        changes: section and position of each entry that has to change, and the new values.
        categories: (id, name) of each class.
        renumber: whether the annotations need new ids.
        problem: why the file as such cannot be used, or None.
        notes: (sentence, whether it is worth a warning).
    """

    faults: list[tuple[str, int, str, str]]
    changes: list[tuple[str, int, dict[str, Any]]]
    categories: list[tuple[int, str]]
    renumber: bool
    problem: str | None
    notes: list[tuple[str, bool]]


def reject(
    found: Findings, content: dict[str, list[Any]], section: str, position: int, fault: Fault
) -> None:
    """Add that an entry cannot be used; ``content`` is the section of the file, by its name."""
    name = _called(SECTIONS[section], content[section][position])
    found["faults"].append((section, position, fault.kind, f"{name}: {fault.reason}"))


def _called(section: str, entry: Any) -> str:
    """A name for an entry of the file in messages, even if the entry is malformed."""
    if not isinstance(entry, dict):
        return f"{section} {short(entry)}"
    name = f"{section} {entry.get('id')}"
    if "image_id" in entry:
        return f"{name} of image {entry['image_id']}"
    return f"{name} ({entry['file_name']})" if "file_name" in entry else name
