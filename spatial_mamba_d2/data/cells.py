"""Generated sample data with many small objects: scenes of cells, with instance annotations.

`generate_cells` writes a tree as :mod:`.shapes` does, without label maps::

    root/
      images/training/000000000001.jpg ...       images/validation/...
      instances_train.json  instances_val.json   COCO instances format

Every scene has the same number of cells, which touch but hardly overlap; a mask is the visible
part. Scene `index` of a split follows from the seed alone, however many are requested.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spatial_mamba_d2.data.images import encode_image
from spatial_mamba_d2.data.pixel_noise import smooth_noise
from spatial_mamba_d2.data.sample_coco import (
    FOLDERS,
    annotation_record,
    check_counts,
    check_position,
    image_record,
    read_parameters,
    write_annotations,
)
from spatial_mamba_d2.data.sample_tree import create_tree

# Increase it with every change of what is drawn or written: trees of other versions are refused.
GENERATOR_VERSION = 1
SUPERSAMPLING = 4
_LARGEST, _SMALLEST = 1.25, 0.75  # diameters in units of the mean one
_MIN_CELL_PX = 8


class Scene(NamedTuple):
    """A scene: RGB ``uint8[H, W, 3]``, and ``int32[H, W]``: the cell at a pixel, from 1; 0: none.

    ``boxes`` are those that the cells were painted into, ``int[N, 4]``: top, left, bottom, right.
    """

    image: np.ndarray
    cells: np.ndarray
    boxes: np.ndarray


def generate_cells(
    root: str | Path,
    *,
    num_train: int = 16,
    num_val: int = 4,
    image_px: int = 1024,
    num_objects: int = 2000,
    cell_px: int = 14,
    seed: int = 0,
) -> Path:
    """Write the sample data to `root`, unless they are there already, and return `root`.

    The tree appears under its name only when it is complete; see :mod:`.sample_tree`.

    Args:
        root: the folder to create. It may exist if it is empty or holds the very same data.
        num_train, num_val: number of scenes in each split, at least 1.
        image_px: sides of a scene.
        num_objects: cells in each scene.
        cell_px: mean diameter of a cell.
        seed: at least 0.

    Raises:
        ValueError: an argument is out of range, so many cells have no room in a scene, or `root`
            holds anything else.
    """
    root = Path(root)
    num_scenes = {"train": num_train, "val": num_val}
    check_counts(num_scenes)
    _check_arguments(image_px, num_objects, cell_px, seed)
    parameters = {
        "version": GENERATOR_VERSION,
        "kind": "cells",
        "num_train": num_train,
        "num_val": num_val,
        "image_px": image_px,
        "num_objects": num_objects,
        "cell_px": cell_px,
        "seed": seed,
    }
    create_tree(
        root,
        parameters,
        write=lambda tree: _write_tree(tree, num_scenes, parameters),
        read_parameters=read_parameters,
    )
    return root


def render_scene(
    split: str,
    index: int,
    *,
    image_px: int = 1024,
    num_objects: int = 2000,
    cell_px: int = 14,
    seed: int = 0,
) -> Scene:
    """Draw scene `index` (from 0) of a split, "train" or "val", in memory.

    Raises:
        ValueError: an argument is out of range; see `generate_cells` for the others.
    """
    check_position(split, index)
    _check_arguments(image_px, num_objects, cell_px, seed)
    rng = np.random.default_rng([seed, list(FOLDERS).index(split), index])
    image = _background(rng, image_px)
    cells = np.zeros((image_px, image_px), np.int32)
    boxes = np.zeros((num_objects, 4), np.int64)
    grid = math.ceil(math.sqrt(num_objects))
    pitch = image_px / grid
    places = rng.permutation(grid * grid)[:num_objects]
    for number, place in enumerate(places.tolist(), 1):
        radius = cell_px / 2 * rng.uniform(_SMALLEST, _LARGEST)
        free = pitch / 2 - radius + 1  # so that neighbours may touch
        centre = (np.array(divmod(place, grid)) + 0.5) * pitch + rng.uniform(-free, free, 2)
        boxes[number - 1] = _paint(rng, image, cells, number, centre, radius)
    image += rng.integers(-6, 7, image.shape)  # sensor noise
    return Scene(np.rint(image.clip(0, 255)).astype(np.uint8), cells, boxes)


def _check_arguments(image_px: int, num_objects: int, cell_px: int, seed: int) -> None:
    if cell_px < _MIN_CELL_PX:
        raise ValueError(f"cell_px must be at least {_MIN_CELL_PX}, got {cell_px}")
    if num_objects < 1:
        raise ValueError(f"num_objects must be at least 1, got {num_objects}")
    least = math.ceil(math.ceil(math.sqrt(num_objects)) * _LARGEST * cell_px)
    if image_px < least:
        raise ValueError(
            f"image_px must be at least {least} for {num_objects} cells of {cell_px} pixels, "
            f"got {image_px}"
        )
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A stained medium, bright, with clouds and grains, float32 [H, W, 3]."""
    tint = np.array([225, 205, 222], np.float32) + rng.uniform(-15, 15, 3).astype(np.float32)
    image = np.tile(tint, (side, side, 1))
    for grain_px, contrast in ((96, 16), (24, 10), (4, 8)):
        image += smooth_noise(rng, side, side, grain_px)[..., None] * np.float32(contrast)
    return image


def _paint(
    rng: np.random.Generator,
    image: np.ndarray,
    cells: np.ndarray,
    number: int,
    centre: np.ndarray,
    radius: float,
) -> tuple[int, int, int, int]:
    """One cell with its nucleus, an ellipse in an ellipse, in place; the box that it lies in."""
    side = image.shape[0]
    low = np.floor(centre - radius).astype(int).clip(0, side)
    high = (np.ceil(centre + radius).astype(int) + 1).clip(0, side)
    (top, left), (bottom, right) = low.tolist(), high.tolist()
    angle, ratio = rng.uniform(0, math.pi), rng.uniform(0.75, 1)
    steps = (np.arange((bottom - top) * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    y = (top + steps - centre[0])[:, None]
    steps = (np.arange((right - left) * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    x = left + steps - centre[1]
    along = (x * math.cos(angle) + y * math.sin(angle)) / radius
    across = (y * math.cos(angle) - x * math.sin(angle)) / (radius * ratio)
    distance = along * along + across * across  # 1 on the outline
    shade = rng.uniform(-20, 20)
    for reach, color in ((1.0, (176, 120, 186)), (rng.uniform(0.35, 0.55), (92, 52, 130))):
        inside = (distance <= reach * reach).reshape(
            bottom - top, SUPERSAMPLING, right - left, SUPERSAMPLING
        )
        coverage = inside.sum(axis=(1, 3), dtype=np.float32) / SUPERSAMPLING**2
        if reach == 1:
            cells[top:bottom, left:right][coverage >= 0.5] = number
        part = image[top:bottom, left:right]
        part += coverage[..., None] * (np.array(color, np.float32) + np.float32(shade) - part)
    return top, left, bottom, right


def _write_tree(root: Path, num_scenes: dict[str, int], parameters: dict[str, Any]) -> None:
    options = {k: parameters[k] for k in ("image_px", "num_objects", "cell_px", "seed")}
    for split, count in num_scenes.items():
        folder = root / "images" / FOLDERS[split]
        folder.mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            scene = render_scene(split, index, **options)
            image_id = index + 1
            file = folder / f"{image_id:012d}.jpg"
            file.write_bytes(encode_image(scene.image, ".jpg"))
            images.append(image_record(image_id, file.name, scene.cells.shape))
            for number, (top, left, bottom, right) in enumerate(scene.boxes.tolist(), 1):
                mask = scene.cells[top:bottom, left:right] == number
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        **annotation_record(mask, 1, top=top, left=left),
                    }
                )
        write_annotations(
            root,
            split,
            f"Generated cells, {split} split",
            parameters,
            images=images,
            annotations=annotations,
            categories=[{"id": 1, "name": "cell", "supercategory": "cell"}],
        )
