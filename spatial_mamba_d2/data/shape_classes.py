"""Generated sample data for classification: one object per image, in class folders.

::

    root/
      train/circle/000000.jpg ...   train/cross/...
      val/circle/000000.jpg ...     val/cross/...
      generator.json                the parameters that it was generated with

The objects are cut out of the images of :mod:`.shapes`, with a margin around them, and resized to
one size. Image ``n`` of a class follows from the seed alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.sample_tree import create_tree
from spatial_mamba_d2.data.shapes import CLASSES, render_image

# Increase it with every change of what is drawn or written: trees of other versions are refused.
GENERATOR_VERSION = 1

SMALLEST_PX = 24  # objects whose larger side is smaller are left out
MARGIN = 1.3  # side of the cut-out, relative to the object's larger side
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
        root: the folder to create. It may exist if it is empty or holds the very same data.
        num_train, num_val: number of images of each class, at least 1.
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

    def write(tree: Path) -> None:
        _write_split(tree / "train", "train", num_train, image_px, seed)
        _write_split(tree / "val", "val", num_val, image_px, seed)
        (tree / PARAMETERS).write_text(json.dumps(parameters), encoding="utf-8")

    def read_parameters(tree: Path) -> list[Any]:
        return [read_json(tree / PARAMETERS)]

    create_tree(root, parameters, write=write, read_parameters=read_parameters)
    return root


def _write_split(folder: Path, split: str, num_images: int, image_px: int, seed: int) -> None:
    missing = {shape.name: num_images for shape in CLASSES}
    index = 0
    while any(missing.values()):
        for name, image in _cut_outs(split, index, image_px, seed):
            if missing[name]:
                write_image(folder / name / f"{num_images - missing[name]:06d}.jpg", image)
                missing[name] -= 1
        index += 1


def _cut_outs(split: str, index: int, image_px: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(class, uint8[image_px, image_px, 3]) of each object in one image that is large enough."""
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
