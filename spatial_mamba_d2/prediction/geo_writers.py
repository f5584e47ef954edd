"""Formats with an outline for each object, in the coordinates of the raster, or else in pixels."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.prediction.masks import ring_area
from spatial_mamba_d2.prediction.predictor import ImagePredictor
from spatial_mamba_d2.prediction.results import ClassScores, Detections, LabelMap
from spatial_mamba_d2.prediction.sources import Georeference
from spatial_mamba_d2.prediction.vector_files import (
    GeoPackage,
    ParquetTable,
    multi_polygon,
    projjson,
)
from spatial_mamba_d2.prediction.writer import ImageInfo, TableWriter, Writer, outlines
from spatial_mamba_d2.system.atomic import replacing

logger = logging.getLogger(__name__)
_PIXELS = "pixels"  # in the column ``crs`` of images without coordinates


class GeoJsonWriter(Writer):
    """A polygon for each object, in the coordinates of the raster, or else in pixels."""

    has_coordinates = True

    def path_of(self, file: Path, name: Path) -> Path:
        return self.output / "geojson" / f"{name}.geojson"

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        self.file = self._begin(self.path_of(image.file, image.name), files)
        self.number = 0
        head = {"type": "FeatureCollection", "name": image.name.as_posix()}
        if image.georeference is not None and not image.georeference.crs.startswith("EPSG:"):
            logger.warning(
                "%s: GeoJSON can name its coordinate reference system as the member crs_wkt only, "
                "which GDAL and QGIS do not read; gpkg has it", image.file,
            )  # fmt: skip
        self.file.write(f"{json.dumps({**head, **_crs(image.georeference)})[:-1]}")
        self.file.write(', "features": [')

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        assert isinstance(result, Detections)
        for i in range(len(result)):
            shapes = [
                [ring.tolist() for ring in rings]
                for rings in _polygons(result, i, image.georeference)
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


class GeoPackageWriter(Writer):
    """A GeoPackage with one layer, whose features are the objects as multipolygons."""

    has_coordinates = True
    columns: Mapping[str, str] = {"class": "INTEGER", "name": "TEXT", "score": "REAL"}

    def path_of(self, file: Path, name: Path) -> Path:
        return self.output / "gpkg" / f"{name}.gpkg"

    def start(self, image: ImageInfo, files: ExitStack) -> None:
        path = self.path_of(image.file, image.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.enter_context(replacing(path))
        file = GeoPackage(temporary, image.name.name, self.columns, image.georeference)
        self.file = files.enter_context(file)

    def add(self, image: ImageInfo, result: Detections | LabelMap | ClassScores) -> None:
        assert isinstance(result, Detections)
        self.file.write(
            (
                _polygons(result, i, image.georeference),
                (
                    int(result.classes[i]),
                    self.names[result.classes[i]],
                    float(result.scores[i]),
                ),
            )
            for i in range(len(result))
        )


class ParquetWriter(TableWriter):
    """The table as Parquet; of objects, with their outlines, as GeoParquet.

    The column ``crs`` names the coordinate reference system of each outline. If all images have the
    same one, it is also that of the file.
    """

    file_name = "predictions.parquet"
    has_coordinates = True

    def __init__(
        self, output: Path, names: tuple[str, ...], model: ImagePredictor, has_times: bool = False
    ):
        super().__init__(output, names, model, has_times)
        ParquetTable.check_installed()

    @property
    def columns(self) -> dict[str, type]:
        has_outlines = self.model.task == "detection"
        return {**super().columns, **({"crs": str, "geometry": bytes} if has_outlines else {})}

    def open(self, files: ExitStack) -> None:
        path = self.output / self.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = files.enter_context(replacing(path))
        self.table = files.enter_context(ParquetTable(temporary, self.columns))
        self.systems: dict[str, Georeference | None] = {}

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        self.table.write(rows)

    def rows(self, image: ImageInfo, result: Detections | ClassScores) -> Iterable[dict[str, Any]]:
        if not isinstance(result, Detections):
            return result.rows()
        crs = image.georeference.crs if image.georeference else _PIXELS
        self.systems.setdefault(crs, image.georeference)
        return (
            {**row, "crs": crs, "geometry": multi_polygon(_polygons(result, i, image.georeference))}
            for i, row in enumerate(result.rows())
        )

    def close(self) -> None:
        if len(self.systems) == 1 and (georeference := next(iter(self.systems.values()))):
            self.table.crs = projjson(georeference)


def _polygons(
    result: Detections, index: int, georeference: Georeference | None
) -> list[list[np.ndarray]]:
    """The outlines of an object, counterclockwise, each with its holes, clockwise."""
    return [
        [_in_crs(ring, georeference, is_hole=j > 0) for j, ring in enumerate(rings)]
        for rings in outlines(result, index)
    ]


def _in_crs(ring: np.ndarray, georeference: Georeference | None, *, is_hole: bool) -> np.ndarray:
    points = ring if georeference is None else georeference.apply(ring)
    return points[::-1] if (ring_area(points) < 0) != is_hole else points


def _crs(georeference: Georeference | None) -> dict[str, Any]:
    """GeoJSON means longitude and latitude, unless this member, of its first version, says more."""
    if georeference is None or georeference.crs == "EPSG:4326":
        return {}
    if georeference.crs.startswith("EPSG:"):
        name = f"urn:ogc:def:crs:EPSG::{georeference.crs.removeprefix('EPSG:')}"
        return {"crs": {"type": "name", "properties": {"name": name}}}
    return {"crs_wkt": georeference.crs}
