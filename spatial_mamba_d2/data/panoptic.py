"""COCO's panoptic annotations, and the label maps that a semantic head next to instances needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spatial_mamba_d2.data.images import read_image, write_image
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.system.missing import no_such

THINGS, IGNORED = 0, 255  # labels of all things together, and of pixels without a category


def segment_ids(image: np.ndarray) -> np.ndarray:
    """Ids of the segments, int64 ``[H, W]``, that an RGB image ``uint8[H, W, 3]`` encodes."""
    return image.astype(np.int64) @ np.array([1, 256, 256**2])


def stuff_labels(categories: list[dict]) -> dict[int, int]:
    """``{id of a category: its label}``: 0 for things, 1, 2, ... for stuff in the order of ids.

    Args:
        categories: of a panoptic file, with ``id`` and ``isthing``.
    """
    labels = {c["id"]: THINGS for c in categories if c["isthing"]}
    stuff = sorted(c["id"] for c in categories if not c["isthing"])
    return {**labels, **{id_: label for label, id_ in enumerate(stuff, start=1)}}


def write_stuff_labels(json_file: Path, folder: Path, output: Path) -> int:
    """Write a label map ``output/<name>.png`` for each image of a COCO panoptic file.

    Labels are those of :func:`stuff_labels`, as of Detectron2's ``prepare_panoptic_fpn.py``; 255
    where the image has no segment.

    Args:
        json_file: in COCO's panoptic format.
        folder: of its PNG files.

    Returns:
        how many were written.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not in COCO's panoptic format.
        OSError: a label map cannot be written.
    """
    content = read_json(json_file)
    if not isinstance(content, dict) or not {"annotations", "categories"} <= content.keys():
        raise ValueError(
            f"{json_file}: must be in COCO's panoptic format, with annotations and categories"
        )
    if not folder.is_dir():
        raise no_such("folder of the panoptic PNG files", folder, "folder")
    labels = stuff_labels(content["categories"])
    if max(labels.values(), default=0) >= IGNORED:
        raise ValueError(f"{json_file}: must have fewer than {IGNORED} categories of stuff")
    for annotation in content["annotations"]:
        path = folder / annotation["file_name"]
        ids = segment_ids(read_image(path))
        label = np.full(ids.shape, IGNORED, np.uint8)
        for segment in annotation["segments_info"]:
            if segment["category_id"] not in labels:
                raise ValueError(f"{json_file}: {path.name} has an unknown category: {segment}")
            label[ids == segment["id"]] = labels[segment["category_id"]]
        write_image((output / annotation["file_name"]).with_suffix(".png"), label)
    return len(content["annotations"])
