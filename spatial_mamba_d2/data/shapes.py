"""Generated sample data: images of coloured shapes with instance and semantic annotations.

`generate_shapes` writes one tree for both tasks::

    root/
      images/training/000000000001.jpg ...       images/validation/...
      annotations/training/000000000001.png ...  annotations/validation/...
      instances_train.json  instances_val.json   COCO instances format
      objectInfo.txt                             the semantic classes, as ADE20K lists its own

An object's mask is its visible part. A semantic label is 1 for background, 2.. for the classes in
the order of `CLASSES`, and 0, to be ignored, where too little of an object is visible for an
instance annotation. Every other visible part of an object is in both annotations.

Image `index` of a split follows from the seed alone, however many images are requested. Pixels
come from integer or exactly rounded arithmetic, so that they are the same on every machine.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass
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

IGNORED, BACKGROUND = 0, 1

MIN_VISIBLE_SHARE = 0.3
MIN_VISIBLE_PX = 16
SUPERSAMPLING = 4


class ShapeClass(NamedTuple):
    """A kind of object. `outline` is a polygon [N, 2] of radius 1 around the origin."""

    category_id: int
    name: str
    hue: float  # in turns
    outline: np.ndarray


def _regular_polygon(*radii: float, repeats: int, start: float = 0) -> np.ndarray:
    """Corners [N, 2] at equal angles from `start` on, their radii cycling through those given."""
    angles = np.linspace(start, start + 2 * math.pi, repeats * len(radii), endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return directions * np.tile(radii, repeats)[:, None]


def _plus_sign(half_width: float) -> np.ndarray:
    reach = math.sqrt(1 - half_width**2)
    arm = np.array([[reach, -half_width], [reach, half_width], [half_width, half_width]])
    quarter_turn = np.array([[0, 1], [-1, 0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])


# The ids have gaps, as COCO's do, so that code which mistakes an id for an index fails.
CLASSES = (
    ShapeClass(1, "circle", 0.00, _regular_polygon(1, repeats=48)),
    ShapeClass(2, "square", 0.34, _regular_polygon(1, repeats=4, start=math.pi / 4)),
    ShapeClass(4, "triangle", 0.60, _regular_polygon(1, repeats=3)),
    ShapeClass(5, "star", 0.14, _regular_polygon(1, 0.45, repeats=5)),
    ShapeClass(7, "cross", 0.82, _plus_sign(0.32)),
)
SEMANTIC_NAMES = ("background", *(shape.name for shape in CLASSES))  # names of labels 1, 2, ...


@dataclass(frozen=True)
class Instance:
    """One object, or one crowd of them: its class and its visible part, bool [H, W]."""

    shape: ShapeClass
    mask: np.ndarray
    iscrowd: bool


@dataclass(frozen=True)
class Sample:
    """One image, uint8 RGB [H, W, 3], with its labels, uint8 [H, W], and its instances."""

    image: np.ndarray
    semantic: np.ndarray
    instances: tuple[Instance, ...]


class _Layer(NamedTuple):
    """What is painted at once: one outline, or those of a crowd, float [N, 2] of (x, y)."""

    class_index: int
    outlines: list[np.ndarray]
    iscrowd: bool


def generate_shapes(
    root: str | Path,
    *,
    num_train: int = 1000,
    num_val: int = 100,
    image_px: tuple[int, int] = (128, 192),
    seed: int = 0,
) -> Path:
    """Write the sample data to `root`, unless they are there already, and return `root`.

    The tree appears under its name only when it is complete; see :mod:`.sample_tree`.

    Args:
        root: the folder to create. It may exist if it is empty or holds the very same data.
        num_train, num_val: number of images in each split, at least 1.
        image_px: the smallest and the largest image side; height and width vary independently.
        seed: at least 0.

    Raises:
        ValueError: an argument is out of range, or `root` holds anything else.
    """
    root = Path(root)
    num_images = {"train": num_train, "val": num_val}
    check_counts(num_images)
    _check_drawing_arguments(image_px, seed)
    parameters = {
        "version": GENERATOR_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_px": list(image_px),
        "seed": seed,
    }
    create_tree(
        root,
        parameters,
        write=lambda tree: _write_tree(tree, num_images, parameters),
        read_parameters=read_parameters,
    )
    return root


def render_image(
    split: str, index: int, *, image_px: tuple[int, int] = (128, 192), seed: int = 0
) -> Sample:
    """Draw image `index` (from 0) of a split, "train" or "val", in memory.

    Raises:
        ValueError: an argument is out of range; see `generate_shapes` for the others.
    """
    check_position(split, index)
    _check_drawing_arguments(image_px, seed)
    rng = np.random.default_rng([seed, list(FOLDERS).index(split), index])
    height, width = rng.integers(*image_px, size=2, endpoint=True).tolist()

    image = _background(rng, height, width)
    layers = _random_layers(rng, height, width)
    seen = np.zeros((height, width), np.uint8)  # number of the topmost layer, from 1
    complete_px = []  # area of each layer, hidden parts included
    for number, layer in enumerate(layers, 1):
        box, coverage = _coverage(layer.outlines, height, width)
        covered = image[box]
        covered += coverage[..., None] * (_surface(rng, layer, height, width, box) - covered)
        inside = coverage >= 0.5
        seen[box][inside] = number
        complete_px.append(np.count_nonzero(inside))
    image += rng.integers(-5, 6, image.shape)  # sensor noise

    semantic = np.full((height, width), BACKGROUND, np.uint8)
    instances = []
    for number, layer in enumerate(layers, 1):
        mask = seen == number
        needed_px = max(MIN_VISIBLE_PX, MIN_VISIBLE_SHARE * complete_px[number - 1])
        if np.count_nonzero(mask) < needed_px:
            semantic[mask] = IGNORED
        else:
            semantic[mask] = BACKGROUND + 1 + layer.class_index
            instances.append(Instance(CLASSES[layer.class_index], mask, layer.iscrowd))
    pixels = np.rint(image.clip(0, 255)).astype(np.uint8)
    return Sample(pixels, semantic, tuple(instances))


def _check_drawing_arguments(image_px: tuple[int, int], seed: int) -> None:
    if len(image_px) != 2 or not 32 <= image_px[0] <= image_px[1]:
        raise ValueError(f"image_px must be (min, max) with 32 <= min <= max, got {image_px}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


def _write_tree(root: Path, num_images: dict[str, int], parameters: dict[str, Any]) -> None:
    seen_px = np.zeros(len(SEMANTIC_NAMES) + 1, np.int64)  # area of each label, over all images
    seen_in = {}  # split -> for each label, the number of images that show it
    for split, count in num_images.items():
        seen_in[split] = np.zeros_like(seen_px)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        image_folder = root / "images" / FOLDERS[split]
        label_folder = root / "annotations" / FOLDERS[split]
        image_folder.mkdir(parents=True)
        label_folder.mkdir(parents=True)
        for index in range(count):
            sample = render_image(
                split, index, image_px=parameters["image_px"], seed=parameters["seed"]
            )
            image_id = index + 1
            stem = f"{image_id:012d}"
            image_file, label_file = image_folder / f"{stem}.jpg", label_folder / f"{stem}.png"
            image_file.write_bytes(encode_image(sample.image, ".jpg"))
            label_file.write_bytes(encode_image(sample.semantic, ".png"))
            images.append(image_record(image_id, image_file.name, sample.semantic.shape))
            for instance in sample.instances:
                identity = {"id": len(annotations) + 1, "image_id": image_id}
                shape, crowd = instance.shape.category_id, instance.iscrowd
                annotations.append({**identity, **annotation_record(instance.mask, shape, crowd)})
            label_px = np.bincount(sample.semantic.ravel(), minlength=len(seen_px))
            seen_px += label_px
            seen_in[split] += label_px > 0
        write_annotations(
            root,
            split,
            f"Generated shapes, {split} split",
            parameters,
            images=images,
            annotations=annotations,
            categories=[
                {"id": shape.category_id, "name": shape.name, "supercategory": "shape"}
                for shape in CLASSES
            ],
        )
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    for label, name in enumerate(SEMANTIC_NAMES, BACKGROUND):
        ratio = seen_px[label] / seen_px.sum()
        lines.append(
            f"{label}\t{ratio:.4f}\t{seen_in['train'][label]}\t{seen_in['val'][label]}\t{name}"
        )
    (root / "objectInfo.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _random_layers(rng: np.random.Generator, height: int, width: int) -> list[_Layer]:
    """What an image shows, from back to front."""
    if rng.random() < 0.05:
        return []
    layers = []
    side = min(height, width)
    for _ in range(rng.integers(2, 9)):
        is_tiny = rng.random() < 0.12
        smallest, largest = (0.025, 0.04) if is_tiny else (0.08, 0.27)
        radius = side * smallest * (largest / smallest) ** rng.random()
        class_index = int(rng.integers(len(CLASSES)))
        center = rng.random(2) * (width, height)
        layers.append(_Layer(class_index, [_outline(rng, class_index, center, radius)], False))
    if rng.random() < 0.1:
        class_index = int(rng.integers(len(CLASSES)))
        members = list(_crowd_outlines(rng, class_index, height, width))
        layers.insert(int(rng.integers(len(layers) + 1)), _Layer(class_index, members, True))
    return layers


def _crowd_outlines(
    rng: np.random.Generator, class_index: int, height: int, width: int
) -> Iterator[np.ndarray]:
    """Tiny shapes on a jittered grid, close together but without overlap."""
    rows, columns = rng.integers(3, 6, size=2).tolist()
    radius = min(height, width) * rng.uniform(0.02, 0.03)
    pitch = 2.4 * radius
    extent = np.array([columns, rows]) * pitch
    corner = rng.random(2) * (np.array([width, height]) - extent)
    for row in range(rows):
        for column in range(columns):
            jitter = rng.uniform(0.3, 0.7, size=2)
            center = corner + (jitter + (column, row)) * pitch
            yield _outline(rng, class_index, center, radius * rng.uniform(0.7, 1))


def _outline(
    rng: np.random.Generator, class_index: int, center: np.ndarray, radius: float
) -> np.ndarray:
    """The outline of a class, squeezed, rotated and moved, in pixels."""
    x, y = CLASSES[class_index].outline.T
    y = y * rng.uniform(0.8, 1)
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    return center + radius * np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)


def _coverage(
    outlines: list[np.ndarray], height: int, width: int
) -> tuple[tuple[slice, slice], np.ndarray]:
    """How much of each pixel the outlines cover together, float32 from 0 to 1.

    Returns the rows and columns of the image that the outlines reach, and the map of these alone.
    Done here because cv2.fillPoly does not draw the same pixels in all versions of OpenCV.
    """
    points = np.concatenate(outlines)
    size = np.array([width, height])
    left, top = np.floor(points.min(axis=0)).clip(0, size).astype(int).tolist()
    right, bottom = np.ceil(points.max(axis=0)).clip(0, size).astype(int).tolist()
    height, width = bottom - top, right - left
    fine_width = width * SUPERSAMPLING
    x0, y0 = points.T * SUPERSAMPLING
    x1, y1 = np.concatenate([np.roll(o, -1, axis=0) for o in outlines]).T * SUPERSAMPLING
    y = np.arange(top * SUPERSAMPLING, bottom * SUPERSAMPLING) + 0.5
    descends = (y0[:, None] <= y) & (y < y1[:, None])
    ascends = (y1[:, None] <= y) & (y < y0[:, None])
    edge, row = np.nonzero(descends | ascends)
    x = x0[edge] + (y[row] - y0[edge]) / (y1[edge] - y0[edge]) * (x1[edge] - x0[edge])
    column = (np.ceil(x - 0.5) - left * SUPERSAMPLING).clip(0, fine_width).astype(np.int64)
    winding = np.zeros((len(y), fine_width + 1), np.int8)  # number of turns around a point
    np.add.at(winding, (row, column), np.where(descends[edge, row], 1, -1).astype(np.int8))
    covered = np.cumsum(winding, axis=1, dtype=np.int8)[:, :fine_width] != 0
    rows = covered.reshape(height, SUPERSAMPLING, fine_width).sum(axis=1, dtype=np.uint8)
    pixels = rows.reshape(height, width, SUPERSAMPLING).sum(axis=2, dtype=np.float32)
    return (slice(top, bottom), slice(left, right)), pixels / SUPERSAMPLING**2


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A dull gradient under noise of several grain sizes, float32 [H, W, 3]."""
    lightness = rng.uniform(60, 190)
    tints = lightness + rng.uniform(-28, 28, size=(2, 3)).astype(np.float32)
    ramp = (1 + _ramp(rng, height, width))[..., None] / 2
    image = tints[0] * (1 - ramp) + tints[1] * ramp
    for cell_px, contrast in ((48, 24), (16, 18), (5, 16), (2, 12)):
        strength = np.float32(rng.uniform(0.1, 1) * contrast)
        image += smooth_noise(rng, height, width, cell_px)[..., None] * strength
    return image


def _surface(
    rng: np.random.Generator, layer: _Layer, height: int, width: int, box: tuple[slice, slice]
) -> np.ndarray:
    """The colours of a layer, shaded and grained, float32 [h, w, 3] in the box."""
    hue = CLASSES[layer.class_index].hue + rng.uniform(-0.04, 0.04)
    color = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.45, 0.9), rng.uniform(0.55, 0.95))
    shading = 1 + np.float32(0.2) * _ramp(rng, height, width)
    shading += np.float32(0.12) * smooth_noise(rng, height, width, 7)
    return shading[box][..., None] * np.array(color, np.float32) * np.float32(255)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A linear slope in some direction, float32 [H, W] from -1 to 1."""
    slope_x, slope_y = rng.uniform(-0.5, 0.5, size=2).astype(np.float32)
    x = np.linspace(-1, 1, width, dtype=np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)
    return slope_x * x + slope_y * y[:, None]
