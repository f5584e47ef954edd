"""Generated sample data for classification: one object a picture, in class folders.

::

    root/
      train/circle/000000.jpg ...   train/cross/...
      val/circle/000000.jpg ...     val/cross/...
      generator.json                by what it was made

The objects are cut out of the pictures of :mod:`.shapes`, with some of what is around them, and
brought to one size. Picture ``n`` of a class follows from the seed alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.data.shapes import CLASSES, render_image
from spatial_mamba_d2.system.atomic import new_folder

# To be raised with every change of what is drawn or written: a tree of another version is refused.
GENERATOR_VERSION = 1

SMALLEST_PX = 24  # of an object's larger side, where it is cut out
MARGIN = 1.3  # side of the cut-out, of the object's larger side
PARAMETERS = "generator.json"


def generate_shape_classes(
    root: str | Path,
    *,
    num_train: int = 100,
    num_val: int = 20,
    image_px: int = 72,
    seed: int = 0,
) -> Path:
    """Write the sample data to ``root``, unless they are there already, and return ``root``.

    Args:
        root: the folder to make. It may exist if it is empty or holds the very same data.
        num_train, num_val: pictures of each class, at least 1.
        image_px: height and width, at least 8.
        seed: at least 0.

    Raises:
        ValueError: an argument is out of its range, or ``root`` holds anything else.
    """
    root = Path(root)
    parameters = {
        "version": GENERATOR_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_px": image_px,
        "seed": seed,
    }
    least = {"num_train": 1, "num_val": 1, "image_px": 8, "seed": 0}
    for name, bound in least.items():
        if parameters[name] < bound:
            raise ValueError(f"{name} must be at least {bound}, got {parameters[name]}")
    if _is_free(root, parameters):
        with new_folder(root) as tree:
            for split, number in (("train", num_train), ("val", num_val)):
                _write_split(tree / split, split, number, image_px, seed)
            (tree / PARAMETERS).write_text(json.dumps(parameters), encoding="utf-8")
        _is_free(root, parameters)  # another process may have been faster, and of another mind
    return root


def _is_free(root: Path, parameters: dict[str, Any]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return True
    try:
        found = json.loads((root / PARAMETERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = "something else"
    if found != parameters:
        raise ValueError(
            f"root must be absent, empty, or hold sample data made with {parameters}; {root} holds "
            f"{found}. Delete it, or name another folder"
        )
    return False


def _write_split(folder: Path, split: str, number: int, image_px: int, seed: int) -> None:
    missing = {shape.name: number for shape in CLASSES}
    index = 0
    while any(missing.values()):
        for name, picture in _cut_outs(split, index, image_px, seed):
            if missing[name]:
                write_image(folder / name / f"{number - missing[name]:06d}.jpg", picture)
                missing[name] -= 1
        index += 1


def _cut_outs(split: str, index: int, image_px: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(class, uint8[image_px, image_px, 3]) of each object in one picture that is large enough."""
    sample = render_image(split, index, seed=seed)
    height, width = sample.semantic.shape
    for instance in sample.instances:
        rows = np.flatnonzero(instance.mask.any(axis=1))
        columns = np.flatnonzero(instance.mask.any(axis=0))
        extent = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
        if instance.iscrowd or extent < SMALLEST_PX:
            continue
        side = min(int(extent * MARGIN), height, width)
        top = int(np.clip((rows[0] + rows[-1] + 1 - side) // 2, 0, height - side))
        left = int(np.clip((columns[0] + columns[-1] + 1 - side) // 2, 0, width - side))
        window = sample.image[top : top + side, left : left + side]
        yield (
            instance.shape.name,
            cv2.resize(window, (image_px, image_px), interpolation=cv2.INTER_LINEAR_EXACT),
        )
