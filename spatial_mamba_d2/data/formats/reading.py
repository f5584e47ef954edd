"""``read_data``: a folder of labelled images, whatever its format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spatial_mamba_d2.data.formats.recognition import FORMATS, recognise
from spatial_mamba_d2.data.formats.records import TASKS, LabelledData, UnusableDataError
from spatial_mamba_d2.system.missing import no_such


def read_data(
    path: str | Path, *, task: str | None = None, extract_to: str | Path | None = None
) -> LabelledData:
    """Read labelled images; their format is recognised by content.

    Args:
        path: a folder, COCO's JSON, or YOLO's ``data.yaml``.
        task: ``detection``, ``segmentation`` or ``classification``; None: that of the first format
            that is recognised.
        extract_to: where images are written that the data set itself holds, as Hugging Face's do.

    Raises:
        FileNotFoundError: no such file or folder.
        UnusableDataError: no format is recognised, or the data cannot be read at all.
        ImportError: a package that the format needs is missing.
    """
    path = Path(path)
    if task not in (None, *TASKS):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if not path.exists():
        raise no_such("data", path, "file or folder")
    folder = Path(extract_to) if extract_to is not None else None
    candidates = recognise(path, task=task, extract_to=folder)
    if not candidates:
        known = "".join(f"\n  {name}: {text}" for name, text in FORMATS.items())
        of_task = f" for {task}" if task else ""
        raise UnusableDataError(f"{path}: in no known format{of_task}. These are known:{known}")
    data = candidates[0].read()
    others = {f"{c.format} ({c.task})" for c in candidates[1:] if c.format != data.format}
    if others:
        note = (
            f"read as {data.format} ({data.task}); the data may also be {', '.join(sorted(others))}"
        )
        data = replace(data, notes=[*data.notes, note])
    return data
