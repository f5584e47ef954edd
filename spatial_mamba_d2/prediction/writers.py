"""Files of predictions, one class for each format.

Each format has a file or folder of its own in the folder of the results, so that none writes over
another one's. Files appear when they are complete. A format gets its data in pieces, of which an
image may have any number: so memory does not grow with the image.

==========  =============================================  ======================================
format      file                                           tasks
==========  =============================================  ======================================
coco        ``coco.json``                                  detection
csv         ``predictions.csv``                            all
geojson     ``geojson/NAME.geojson``                       detection
yolo        ``yolo/labels/NAME.txt``, ``yolo/classes.txt``  detection
labelme     ``labelme/NAME.json``                          detection
label       ``label/NAME.png``, or ``.tif`` of a raster    segmentation
png         ``png/NAME.png``, a drawing                    all
==========  =============================================  ======================================
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index
from spatial_mamba_d2.data.images import encode_image, read_image
from spatial_mamba_d2.prediction.label_files import GeoTiffLabels, PngLabels
from spatial_mamba_d2.prediction.masks import crop_of_rle, polygons_of, ring_area
from spatial_mamba_d2.prediction.predictor import ImagePredictor
from spatial_mamba_d2.prediction.results import (
    ClassScores,
    Detections,
    LabelMap,
    category_id,
    count_rows,
)
from spatial_mamba_d2.prediction.sources import RASTER_SUFFIXES, Georeference, has_rasterio
from spatial_mamba_d2.system.atomic import replacing


@dataclass(frozen=True)
class ImageInfo:
    """An image of which results are written.

    Attributes:
        number: from 1 on, its id in COCO files.
        file: its path.
        name: of its results, a relative path without suffix.
        size: height and width.
        georeference: where it lies, if that is known.
        is_whole: whether it was predicted at once, and not by windows.
    """

    number: int
    file: Path
    name: Path
    size: tuple[int, int]
    georeference: Georeference | None
    is_whole: bool


class Writer:
    """A format. The methods are called in the order in which they are listed here.

    Args:
        output: the folder of the results.
        names: of the classes.
        model: what predicted, for drawings.
    """

    tasks: tuple[str, ...] = ("detection",)

    def __init__(self, output: Path, names: tuple[str, ...], model: ImagePredictor):
        self.output, self.names, self.model = output, names, model

    def paths(self, files: Sequence[Path], names: Sequence[Path]) -> list[Path]:
        """The files that will be written, for images and the names of their results."""
        return [self.path_of(file, name) for file, name in zip(files, names, strict=True)]

    def path_of(self, file: Path, name: Path) -> Path:
        """The file of one image."""
        raise NotImplementedError

    def open(self, files: ExitStack) -> None:
        """Begin what all images have in common; ``files`` completes or drops it."""

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        """Begin an image; ``files`` completes or drops what belongs to it alone."""

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        """Some of the image's objects, or its class scores, or its label map."""

    def add_rows(self, image: ImageInfo, rows: np.ndarray) -> None:
        """The next rows of the image's label map, ``[h, W]``."""

    def finish(self, image: ImageInfo) -> None:
        """End the image."""

    def close(self) -> None:
        """End what all images have in common."""

    def _begin(self, path: Path, files: ExitStack, **options: Any) -> TextIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.enter_context(replacing(path))
        return files.enter_context(temporary.open("w", encoding="utf-8", **options))


class _OneFile(Writer):
    file_name = ""

    def paths(self, files: Sequence[Path], names: Sequence[Path]) -> list[Path]:
        return [self.output / self.file_name]


class CocoWriter(_OneFile):
    """A COCO data set whose annotations have scores; pycocotools reads it."""

    file_name = "coco.json"

    def open(self, files: ExitStack) -> None:
        self.file = self._begin(self.output / self.file_name, files)
        self.images: list[dict[str, Any]] = []
        self.num_annotations = 0
        self.file.write('{"annotations": [')

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        assert isinstance(result, Detections)
        for item in result.to_coco(image.number):
            separator = ",\n" if self.num_annotations else "\n"
            self.num_annotations += 1
            annotation = {"id": self.num_annotations, **item, "iscrowd": 0}
            self.file.write(separator + json.dumps(annotation))

    def finish(self, image: ImageInfo) -> None:
        height, width = image.size
        name = image.file.as_posix()
        self.images.append(
            {"id": image.number, "file_name": name, "width": width, "height": height}
        )

    def close(self) -> None:
        categories = [{"id": category_id(i), "name": name} for i, name in enumerate(self.names)]
        self.file.write(f'\n],\n"images": {json.dumps(self.images)}')
        self.file.write(f',\n"categories": {json.dumps(categories)}}}\n')


class CsvWriter(_OneFile):
    """A table with a row for each object, class of a label map, or most probable class."""

    file_name = "predictions.csv"
    tasks = ("detection", "segmentation", "classification")
    columns: Mapping[str, Sequence[str]] = {
        "detection": ("image", "class", "name", "score", "x1", "y1", "x2", "y2", "area"),
        "segmentation": ("image", "class", "name", "pixels", "share"),
        "classification": ("image", "rank", "class", "name", "score"),
    }

    def open(self, files: ExitStack) -> None:
        file = self._begin(self.output / self.file_name, files, newline="")
        self.table = csv.DictWriter(file, self.columns[self.model.task], lineterminator="\n")
        self.table.writeheader()

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        self.counts = np.zeros(ignore_index(len(self.names)) + 1, np.int64)

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        if not isinstance(result, LabelMap):
            self.table.writerows(result.rows())

    def add_rows(self, image: ImageInfo, rows: np.ndarray) -> None:
        self.counts += np.bincount(rows.ravel(), minlength=len(self.counts))

    def finish(self, image: ImageInfo) -> None:
        self.table.writerows(count_rows(self.counts, self.names, image.file))


class GeoJsonWriter(Writer):
    """A polygon for each object, in the coordinates of the raster, or else in pixels."""

    def path_of(self, file: Path, name: Path) -> Path:
        return self.output / "geojson" / f"{name}.geojson"

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        self.file = self._begin(self.path_of(image.file, image.name), files)
        self.number = 0
        head = {"type": "FeatureCollection", "name": image.name.as_posix()}
        self.file.write(f"{json.dumps({**head, **_crs(image.georeference)})[:-1]}")
        self.file.write(', "features": [')

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        assert isinstance(result, Detections)
        for i in range(len(result)):
            shapes = [
                [_in_crs(ring, image.georeference, is_hole=j > 0) for j, ring in enumerate(rings)]
                for rings in outlines(result, i)
            ]
            single = len(shapes) == 1
            geometry = {
                "type": "Polygon" if single else "MultiPolygon",
                "coordinates": shapes[0] if single else shapes,
            }
            properties = {
                "class": int(result.classes[i]),
                "name": self.names[result.classes[i]],
                "score": float(result.scores[i]),
            }
            feature = {"type": "Feature", "properties": properties, "geometry": geometry}
            self.file.write((",\n" if self.number else "\n") + json.dumps(feature))
            self.number += 1

    def finish(self, image: ImageInfo) -> None:
        self.file.write("\n]}\n")


def _crs(georeference: Georeference | None) -> dict[str, Any]:
    """GeoJSON means longitude and latitude, unless this member, of its first version, says more."""
    if georeference is None or georeference.crs == "EPSG:4326":
        return {}
    if georeference.crs.startswith("EPSG:"):
        name = f"urn:ogc:def:crs:EPSG::{georeference.crs.removeprefix('EPSG:')}"
        return {"crs": {"type": "name", "properties": {"name": name}}}
    return {"crs_wkt": georeference.crs}


def _in_crs(
    ring: np.ndarray, georeference: Georeference | None, *, is_hole: bool
) -> list[list[float]]:
    points = ring if georeference is None else georeference.apply(ring)
    if (ring_area(points) < 0) != is_hole:  # outlines go counterclockwise, holes clockwise
        points = points[::-1]
    return points.tolist()


def outlines(result: Detections, index: int) -> list[list[np.ndarray]]:
    """Rings of an object's mask, see :func:`.masks.polygons_of`, or of its box."""
    if result.masks is not None:
        return polygons_of(crop_of_rle(result.masks[index]))
    x1, y1, x2, y2 = result.boxes[index].tolist()
    return [[np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)])]]


class YoloWriter(Writer):
    """``class x y ...`` for each object, relative to the image: the outline of the largest part.

    Without masks: ``class x y width height``, of which x and y are the centre.
    """

    def path_of(self, file: Path, name: Path) -> Path:
        return self.output / "yolo" / "labels" / f"{name}.txt"

    def paths(self, files: Sequence[Path], names: Sequence[Path]) -> list[Path]:
        return [*super().paths(files, names), self._classes]

    @property
    def _classes(self) -> Path:
        return self.output / "yolo" / "classes.txt"

    def open(self, files: ExitStack) -> None:
        self._begin(self._classes, files).write("".join(f"{name}\n" for name in self.names))

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        self.file = self._begin(self.path_of(image.file, image.name), files)

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        assert isinstance(result, Detections)
        height, width = image.size
        for i in range(len(result)):
            if result.masks is None:
                x1, y1, x2, y2 = result.boxes[i].tolist()
                points = np.array([((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1, y2 - y1)])
            else:
                points = outlines(result, i)[0][0][:-1]
            values = (points / (width, height)).ravel()
            words = [str(result.classes[i]), *(f"{value:.6f}" for value in values)]
            self.file.write(" ".join(words) + "\n")


class LabelmeWriter(Writer):
    """Files that LabelMe opens; parts of an object share a ``group_id``. Holes are filled."""

    version = "5.5.0"

    def path_of(self, file: Path, name: Path) -> Path:
        return self.output / "labelme" / f"{name}.json"

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        path = self.path_of(image.file, image.name)
        self.file = self._begin(path, files)
        self.num_shapes, self.num_groups = 0, 0
        height, width = image.size
        head: dict[str, Any] = {
            "version": self.version,
            "flags": {},
            "imagePath": Path(os.path.relpath(image.file, path.parent)).as_posix(),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        self.file.write(f'{json.dumps(head)[:-1]}, "shapes": [')

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        assert isinstance(result, Detections)
        for i in range(len(result)):
            for shape in self._shapes(result, i):
                self.file.write((",\n" if self.num_shapes else "\n") + json.dumps(shape))
                self.num_shapes += 1

    def _shapes(self, result: Detections, index: int) -> Iterator[dict[str, Any]]:
        if result.masks is None:
            x1, y1, x2, y2 = result.boxes[index].tolist()
            kind, parts = "rectangle", [[[x1, y1], [x2, y2]]]
        else:
            kind = "polygon"
            parts = [rings[0][:-1].tolist() for rings in outlines(result, index)]
        group = None
        if len(parts) > 1:
            self.num_groups += 1
            group = self.num_groups
        for points in parts:
            yield {
                "label": self.names[result.classes[index]],
                "points": points,
                "group_id": group,
                "description": "",
                "shape_type": kind,
                "flags": {},
                "mask": None,
                "score": float(result.scores[index]),
            }

    def finish(self, image: ImageInfo) -> None:
        self.file.write("\n]}\n")


class LabelWriter(Writer):
    """Label maps with the index of each pixel's class, 255 where nothing was predicted.

    With more than 255 classes, they have 16 bits, and 65535 there. PNG; of a raster that rasterio
    reads, a GeoTIFF in tiles with its coordinates.
    """

    tasks = ("segmentation",)

    def path_of(self, file: Path, name: Path) -> Path:
        is_raster = file.suffix.lower() in RASTER_SUFFIXES and has_rasterio()
        return self.output / "label" / f"{name}{'.tif' if is_raster else '.png'}"

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        path = self.path_of(image.file, image.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.enter_context(replacing(path))
        number = len(self.names)
        if path.suffix == ".tif":
            file = GeoTiffLabels(temporary, image.size, number, image.georeference)
            self.file: GeoTiffLabels | PngLabels = files.enter_context(file)
        else:
            self.file = files.enter_context(PngLabels(temporary, image.size, number))

    def add_rows(self, image: ImageInfo, rows: np.ndarray) -> None:
        self.file.write(rows)


class PngWriter(Writer):
    """Drawings of the predictions in images that were predicted at once."""

    tasks = ("detection", "segmentation", "classification")

    def path_of(self, file: Path, name: Path) -> Path:
        return self.output / "png" / f"{name}.png"

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        if image.is_whole:
            pixels = read_image(image.file, self.model.num_channels, self.model.value_range)
            path = self.path_of(image.file, image.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(encode_image(self.model.draw(pixels, result), path.suffix))


FORMATS: dict[str, type[Writer]] = {
    "coco": CocoWriter,
    "csv": CsvWriter,
    "geojson": GeoJsonWriter,
    "yolo": YoloWriter,
    "labelme": LabelmeWriter,
    "label": LabelWriter,
    "png": PngWriter,
}


def check_formats(formats: Iterable[str], task: str | None = None) -> list[str]:
    """The formats, each once.

    Raises:
        ValueError: one is unknown, or has no meaning for the task.
    """
    formats = list(dict.fromkeys(formats))
    if not formats or (unknown := [name for name in formats if name not in FORMATS]):
        got = ", ".join(unknown) if formats else "none"
        raise ValueError(f"format must be among {', '.join(FORMATS)}, got {got}")
    if task is not None:
        valid = [name for name, writer in FORMATS.items() if task in writer.tasks]
        if others := [name for name in formats if name not in valid]:
            raise ValueError(
                f"format must be among {', '.join(valid)} for {task}, got {', '.join(others)}"
            )
    return formats
