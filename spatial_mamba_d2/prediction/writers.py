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
gpkg        ``gpkg/NAME.gpkg``                             detection
parquet     ``predictions.parquet``                        all
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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.data.images import encode_image, read_image
from spatial_mamba_d2.prediction.geo_writers import GeoJsonWriter, GeoPackageWriter, ParquetWriter
from spatial_mamba_d2.prediction.label_files import GeoTiffLabels, PngLabels
from spatial_mamba_d2.prediction.results import ClassScores, Detections, LabelMap, category_id
from spatial_mamba_d2.prediction.sources import is_raster
from spatial_mamba_d2.prediction.writer import ImageInfo, OneFile, TableWriter, Writer, outlines
from spatial_mamba_d2.system.atomic import replacing


class CocoWriter(OneFile):
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
        record = {"id": image.number, "file_name": name, "width": width, "height": height}
        if image.time_s is not None:
            record["time_s"] = image.time_s
        self.images.append(record)

    def close(self) -> None:
        categories = [{"id": category_id(i), "name": name} for i, name in enumerate(self.names)]
        self.file.write(f'\n],\n"images": {json.dumps(self.images)}')
        self.file.write(f',\n"categories": {json.dumps(categories)}}}\n')


class CsvWriter(TableWriter):
    """The table as CSV."""

    file_name = "predictions.csv"

    def open(self, files: ExitStack) -> None:
        file = self._begin(self.output / self.file_name, files, newline="")
        self.table = csv.DictWriter(file, list(self.columns), lineterminator="\n")
        self.table.writeheader()

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        self.table.writerows(rows)


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
    has_coordinates = True

    def path_of(self, file: Path, name: Path) -> Path:
        return self.output / "label" / f"{name}{'.tif' if is_raster(file) else '.png'}"

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
            if image.pixels is not None:
                pixels = image.pixels()
            else:
                pixels = read_image(image.file, self.model.num_channels, self.model.value_range)
            path = self.path_of(image.file, image.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(encode_image(self.model.draw(pixels, result), path.suffix))


FORMATS: dict[str, type[Writer]] = {
    "coco": CocoWriter,
    "csv": CsvWriter,
    "geojson": GeoJsonWriter,
    "gpkg": GeoPackageWriter,
    "parquet": ParquetWriter,
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
