"""Merging of windows, measured alone: a generated scene and a model that knows its truth.

    python -m spatial_mamba_d2.profiling.large_scene --output output/scene --side 20000

The scene is a tiled GeoTIFF with objects that do not touch, some larger than a window, whose
colours are their numbers. What is predicted for it by windows is compared with the truth: masks in
the COCO file by pycocotools' form, coordinates in GeoJSON and GeoPackage files as GDAL reads them
(rasterio and pyogrio must be installed). The peak of the memory is that of the process that
predicts, which does nothing else; the model, which knows the truth, holds nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.prediction import Detections, Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.masks import crop_of_rle, encode_bitmap
from spatial_mamba_d2.prediction.merging import merge_detections
from spatial_mamba_d2.prediction.sources import open_raster
from spatial_mamba_d2.prediction.windows import Grid
from spatial_mamba_d2.profiling.memory import peak_memory_mb, reset_peak_memory_mb
from spatial_mamba_d2.system.cli import build_parser, run_tool

NAMES = ("ball", "bar", "ring")
_CRS, _ORIGIN, _PIXEL_M = "EPSG:32633", (500_000.0, 5_400_000.0), 0.5
_STRIP_PX = 512


class Oracle:
    """A detector that reads the objects of a window, and their classes, out of the colours."""

    task = "detection"
    names: tuple[str, ...] = NAMES
    num_channels = 3
    value_range: PixelRange | None = None

    def __call__(self, image: np.ndarray) -> Detections:
        numbers = image.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        boxes, masks, found = [], [], []
        for number, (x, y, width, height) in _rectangles(numbers).items():
            mask = np.zeros(numbers.shape, bool)
            part = numbers[y : y + height, x : x + width]
            mask[y : y + height, x : x + width] = part == number
            boxes.append((x, y, x + width, y + height))
            masks.append(encode_bitmap(mask))
            found.append(number)
        return Detections(
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            scores=np.ones(len(found), np.float32),
            classes=np.array(found, np.int64) % len(NAMES),
            masks=tuple(masks),
            names=NAMES,
            image_size=(numbers.shape[0], numbers.shape[1]),
        )

    def batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        return [self(image) for image in images]

    def draw(self, image: np.ndarray, result: Detections) -> np.ndarray:
        return image


def _rectangles(numbers: np.ndarray) -> dict[int, tuple[int, int, int, int]]:
    """The bounding rectangle x, y, width, height of each number above 0."""
    rows, columns = np.nonzero(numbers)
    values = numbers[rows, columns]
    order = np.argsort(values, kind="stable")
    values, rows, columns = values[order], rows[order], columns[order]
    starts = np.flatnonzero(np.diff(values, prepend=0))
    if not len(starts):
        return {}
    low = np.minimum.reduceat(columns, starts), np.minimum.reduceat(rows, starts)
    high = np.maximum.reduceat(columns, starts), np.maximum.reduceat(rows, starts)
    sides = zip(*low, high[0] - low[0] + 1, high[1] - low[1] + 1, strict=True)
    return {
        int(values[start]): (int(x), int(y), int(width), int(height))
        for start, (x, y, width, height) in zip(starts, sides, strict=True)
    }


def draw_numbers(numbers: np.ndarray, num_objects: int, num_large: int, seed: int = 0) -> int:
    """Draw objects that do not touch into ``numbers``, zeros ``int32[H, W]``; how many there are.

    Args:
        num_large: of them bars of up to 2100 pixels; the others have 6 to 50.
    """
    rng = np.random.default_rng(seed)
    height, width = numbers.shape
    number = 0
    while number < num_objects:
        reach = rng.integers(-1500, 1500, 2) if number < num_large else rng.integers(-20, 20, 2)
        thick = int(rng.integers(20, 60) if number < num_large else rng.integers(6, 30))
        x, y = int(rng.integers(width)), int(rng.integers(height))
        pad = thick + 2
        left, top = max(min(x, x + reach[0]) - pad, 0), max(min(y, y + reach[1]) - pad, 0)
        part = numbers[top : max(y, y + reach[1]) + pad + 1, left : max(x, x + reach[0]) + pad + 1]
        shape = np.zeros(part.shape, np.uint8)
        start = (x - left, y - top)
        end = (int(x + reach[0] - left), int(y + reach[1] - top))
        cv2.line(shape, start, end, 1, thick)
        if shape.any() and not part[cv2.dilate(shape, np.ones((3, 3), np.uint8)) > 0].any():
            number += 1
            part[shape > 0] = number
    return number


def write_scene(numbers: np.ndarray, path: Path) -> None:
    """A GeoTIFF of RGB in tiles, whose colours are the numbers."""
    import rasterio
    from rasterio.windows import Window

    height, width = numbers.shape
    transform = rasterio.Affine(_PIXEL_M, 0, _ORIGIN[0], 0, -_PIXEL_M, _ORIGIN[1])
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=3, dtype="uint8",
        crs=_CRS, transform=transform, tiled=True, compress="deflate", photometric="rgb",
    ) as file:  # fmt: skip
        for top in range(0, height, _STRIP_PX):
            strip = numbers[top : top + _STRIP_PX]
            bands = np.stack([strip & 255, strip >> 8 & 255, strip >> 16]).astype(np.uint8)
            file.write(bands, window=Window(0, top, width, len(strip)))


def describe(rectangles: np.ndarray, grid: Grid) -> dict[str, int]:
    """How many of the objects, ``int64[N, 4]`` of x, y, width and height, windows cut."""
    low, high = rectangles[:, :2], rectangles[:, :2] + rectangles[:, 2:]
    cut = np.zeros(len(rectangles), bool)
    complete = np.ones(len(rectangles), bool)  # in at least one window
    for axis, starts in enumerate((grid.lefts, grid.tops)):
        ends = np.array(starts) + grid.window_px
        for edge in (*starts[1:], *ends[:-1]):
            cut |= (low[:, axis] < edge) & (edge < high[:, axis])
        holds = (low[:, axis, None] >= starts) & (high[:, axis, None] <= ends)
        complete &= holds.any(axis=1)
    return {
        "objects": len(rectangles),
        "cut_by_a_window": int(cut.sum()),
        "complete_in_no_window": int((~complete).sum()),
        "larger_than_a_window": int((rectangles[:, 2:].max(axis=1) > grid.window_px).sum()),
    }


def compare(sizes: np.ndarray, numbers: np.ndarray, coco: dict[str, Any]) -> dict[str, Any]:
    """Predicted masks against the truth, of which ``sizes`` has the numbers of pixels."""
    best: dict[int, float] = {}
    num_duplicates = 0
    for annotation in coco["annotations"]:
        crop = crop_of_rle(annotation["segmentation"])
        part = numbers[crop.top : crop.bottom, crop.left : crop.right][crop.bitmap]
        values, counts = np.unique(part[part > 0], return_counts=True)
        number = int(values[counts.argmax()])
        inside = int(counts.max())
        num_duplicates += number in best
        best[number] = max(best.get(number, 0), inside / (sizes[number] + part.size - inside))
    return {
        "lost": len(sizes) - 1 - len(best),
        "duplicates": num_duplicates,
        "lowest_iou": min(best.values()),
    }


def compare_coordinates(
    rectangles: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, path: Path
) -> dict[str, Any]:
    """Polygons of a file, in its coordinates, against the truth in pixels.

    An object is right if the polygon that has a point in common with it has the same area; its
    offset is the largest distance between their bounds.
    """
    import shapely
    from pyogrio import raw

    meta, _, geometries, _ = raw.read(path)
    if meta["crs"] != _CRS:
        raise ValueError(f"{path} must be in {_CRS}, got {meta['crs']}")
    to_pixels = np.array([1, -1]) / _PIXEL_M
    polygons = shapely.transform(
        shapely.from_wkb(geometries), lambda points: (points - _ORIGIN) * to_pixels
    )
    x, y = np.floor(shapely.get_coordinates(shapely.point_on_surface(polygons))).astype(int).T
    found = numbers[y, x]
    areas_differ = shapely.area(polygons) != sizes[found]
    truth = rectangles[found - 1].astype(np.float64)
    truth[:, 2:] += truth[:, :2]
    return {
        "objects": len(set(found[~areas_differ].tolist())),
        "not_right": int((areas_differ | (found == 0)).sum()),
        "largest_offset_px": float(np.abs(shapely.bounds(polygons) - truth).max()),
    }


def _predict(folder: Path, window_px: int, overlap_px: int) -> None:
    options = Options(["coco", "geojson", "gpkg"], 0.0, window_px, overlap_px)
    before = reset_peak_memory_mb()
    start, start_processor = time.perf_counter(), time.process_time()
    predict_files([folder / "scene.tif"], folder / "predictions", Predictor(Oracle()), options)
    figures = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - start_processor,
        "peak_mb": peak_memory_mb(),
        "before_mb": before,
        **_time_merging(folder / "scene.tif", window_px, overlap_px),
    }
    (folder / "figures.json").write_text(json.dumps(figures))


def _time_merging(path: Path, window_px: int, overlap_px: int) -> dict[str, Any]:
    """Of the detections of all windows, which are in the memory."""
    model, raster = Oracle(), open_raster(path, 3, None)
    grid = Grid(raster.size, window_px, overlap_px)
    images = map(raster.read, grid)
    results = [None if image is None else model(image) for image in images]
    start, start_processor = time.perf_counter(), time.process_time()
    num_objects = sum(map(len, merge_detections(grid, results, NAMES)))
    return {
        "merged_masks": sum(len(result) for result in results if result is not None),
        "merged_objects": num_objects,
        "merging_seconds": time.perf_counter() - start,
        "merging_processor_seconds": time.process_time() - start_processor,
    }


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/scene"))
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--objects", type=int, default=25_000)
    parser.add_argument("--large", type=int, default=60, help="of them bars of up to 2100 pixels")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--only-predict", action="store_true", help="for the scene in --output")
    args = parser.parse_args()
    if args.only_predict:
        return _predict(args.output, args.window, args.overlap)
    args.output.mkdir(parents=True, exist_ok=True)
    numbers = np.zeros((args.side, args.side), np.int32)
    draw_numbers(numbers, args.objects, args.large)
    write_scene(numbers, args.output / "scene.tif")
    command = [sys.executable, "-m", "spatial_mamba_d2.profiling.large_scene", *sys.argv[1:]]
    subprocess.run([*command, "--only-predict"], check=True)
    predictions = args.output / "predictions"
    sizes = np.bincount(numbers.ravel())
    by_number = _rectangles(numbers)
    rectangles = np.array([by_number[number] for number in range(1, len(sizes))])
    figures = {
        **describe(rectangles, Grid(numbers.shape, args.window, args.overlap)),
        **read_json(args.output / "figures.json"),
        **compare(sizes, numbers, read_json(predictions / "coco.json")),
    }
    for suffix in ("geojson", "gpkg"):
        path = predictions / suffix / f"scene.{suffix}"
        found = compare_coordinates(rectangles, sizes, numbers, path)
        figures.update({f"{suffix}_{name}": value for name, value in found.items()})
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    run_tool(main)
