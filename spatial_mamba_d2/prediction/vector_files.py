"""Files of polygons, written in pieces: GeoPackage by SQLite, GeoParquet by pyarrow."""

from __future__ import annotations

import errno
import json
import math
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spatial_mamba_d2.prediction.sources import Georeference

Polygon = Sequence[np.ndarray]  # the outline, then holes: closed rings float64[N, 2]

_WGS84 = (
    'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563,'
    'AUTHORITY["EPSG","7030"]],AUTHORITY["EPSG","6326"]],PRIMEM["Greenwich",0,'
    'AUTHORITY["EPSG","8901"]],UNIT["degree",0.0174532925199433,AUTHORITY["EPSG","9122"]],'
    'AUTHORITY["EPSG","4326"]]'
)
_UNDEFINED_CARTESIAN, _OF_OUR_OWN = -1, 100_000  # ids of coordinate reference systems
# The tables that version 1.2 of the standard requires (OGC 12-128r15, annex C).
_SCHEMA = """
CREATE TABLE gpkg_spatial_ref_sys (srs_name TEXT NOT NULL, srs_id INTEGER NOT NULL PRIMARY KEY,
  organization TEXT NOT NULL, organization_coordsys_id INTEGER NOT NULL, definition TEXT NOT NULL,
  description TEXT);
CREATE TABLE gpkg_contents (table_name TEXT NOT NULL PRIMARY KEY, data_type TEXT NOT NULL,
  identifier TEXT UNIQUE, description TEXT DEFAULT '', last_change DATETIME NOT NULL DEFAULT
  (strftime('%Y-%m-%dT%H:%M:%fZ','now')), min_x DOUBLE, min_y DOUBLE, max_x DOUBLE, max_y DOUBLE,
  srs_id INTEGER, CONSTRAINT fk_gc_r_srs_id FOREIGN KEY (srs_id) REFERENCES
  gpkg_spatial_ref_sys(srs_id));
CREATE TABLE gpkg_geometry_columns (table_name TEXT NOT NULL, column_name TEXT NOT NULL,
  geometry_type_name TEXT NOT NULL, srs_id INTEGER NOT NULL, z TINYINT NOT NULL, m TINYINT NOT NULL,
  CONSTRAINT pk_geom_cols PRIMARY KEY (table_name, column_name),
  CONSTRAINT uk_gc_table_name UNIQUE (table_name),
  CONSTRAINT fk_gc_tn FOREIGN KEY (table_name) REFERENCES gpkg_contents(table_name),
  CONSTRAINT fk_gc_srs FOREIGN KEY (srs_id) REFERENCES gpkg_spatial_ref_sys(srs_id));
"""
_APPLICATION_ID, _VERSION = 0x47504B47, 10200
_LAST_CHANGE = "1970-01-01T00:00:00.000Z"  # so that the bytes depend on the predictions only
_PRAGMAS = (
    f"application_id = {_APPLICATION_ID}",
    f"user_version = {_VERSION}",
    "journal_mode = OFF",  # the file replaces the earlier one when it is complete
    "synchronous = OFF",
)
_ROWS_IN_GROUP = 8192  # of a Parquet file


def multi_polygon(polygons: Sequence[Polygon]) -> bytes:
    """Well-known binary, little-endian, of a multipolygon."""
    parts = [struct.pack("<BII", 1, 6, len(polygons))]
    for rings in polygons:
        parts.append(struct.pack("<BII", 1, 3, len(rings)))
        for ring in rings:
            parts += [struct.pack("<I", len(ring)), ring.astype("<f8").tobytes()]
    return b"".join(parts)


class GeoPackage:
    """A GeoPackage with one layer of multipolygons.

    Args:
        path: the file, which is written over.
        layer: its name.
        columns: name and SQLite type of each attribute.
        georeference: where the coordinates lie; None: they are pixels, with y down.
    """

    def __init__(
        self,
        path: Path,
        layer: str,
        columns: Mapping[str, str],
        georeference: Georeference | None,
    ):
        path.unlink(missing_ok=True)  # of a process that was killed
        self.path, self.layer = path, layer
        self.bounds = [math.inf, math.inf, -math.inf, -math.inf]
        self.number = 0
        with self._as_os_error():
            self.file = sqlite3.connect(path, isolation_level=None)
            for pragma in _PRAGMAS:
                self.file.execute(f"PRAGMA {pragma}")
            self.file.executescript(_SCHEMA)
            self.file.execute("BEGIN")
            self.srs_id = self._write_systems(georeference)
            self._create_layer(columns)

    def _write_systems(self, georeference: Georeference | None) -> int:
        rows = [
            ("Undefined Cartesian SRS", -1, "NONE", -1, "undefined", None),
            ("Undefined geographic SRS", 0, "NONE", 0, "undefined", None),
            ("WGS 84 geodetic", 4326, "EPSG", 4326, _WGS84, None),
        ]
        chosen = _UNDEFINED_CARTESIAN
        if georeference is not None:
            name, code, definition = _describe(georeference)
            chosen = _OF_OUR_OWN if code is None else code
            organization = ("NONE", _OF_OUR_OWN) if code is None else ("EPSG", code)
            if chosen != 4326:
                rows.append((name, chosen, *organization, definition, None))
        self.file.executemany("INSERT INTO gpkg_spatial_ref_sys VALUES (?, ?, ?, ?, ?, ?)", rows)
        return chosen

    def _create_layer(self, columns: Mapping[str, str]) -> None:
        declared = ", ".join(f"{_quoted(name)} {kind}" for name, kind in columns.items())
        table = _quoted(self.layer)
        self.file.execute(
            f"CREATE TABLE {table} (fid INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, "
            f"geom MULTIPOLYGON, {declared})"
        )
        marks = ", ".join("?" * (2 + len(columns)))
        self.insertion = f"INSERT INTO {table} VALUES ({marks})"
        self.file.execute(
            "INSERT INTO gpkg_contents (table_name, data_type, identifier, last_change, srs_id) "
            "VALUES (?, 'features', ?, ?, ?)",
            (self.layer, self.layer, _LAST_CHANGE, self.srs_id),
        )
        self.file.execute(
            "INSERT INTO gpkg_geometry_columns VALUES (?, 'geom', 'MULTIPOLYGON', ?, 0, 0)",
            (self.layer, self.srs_id),
        )

    def write(self, features: Iterable[tuple[Sequence[Polygon], tuple[Any, ...]]]) -> None:
        """Features: polygons, and the values of the columns.

        Raises:
            OSError: they cannot be written.
        """
        with self._as_os_error():
            self.file.executemany(self.insertion, self._rows(features))

    def _rows(
        self, features: Iterable[tuple[Sequence[Polygon], tuple[Any, ...]]]
    ) -> Iterator[tuple[Any, ...]]:
        for polygons, values in features:
            points = np.concatenate([rings[0] for rings in polygons])
            (min_x, min_y), (max_x, max_y) = points.min(0).tolist(), points.max(0).tolist()
            low, high = self.bounds[:2], self.bounds[2:]
            self.bounds = [
                min(low[0], min_x), min(low[1], min_y), max(high[0], max_x), max(high[1], max_y)
            ]  # fmt: skip
            # Little-endian, with an envelope of x and y.
            head = struct.pack("<2sBBi4d", b"GP", 0, 3, self.srs_id, min_x, max_x, min_y, max_y)
            self.number += 1
            yield self.number, head + multi_polygon(polygons), *values

    @contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            number = errno.ENOSPC if "full" in str(error) else errno.EIO
            raise OSError(number, f"SQLite: {error}") from error

    def __enter__(self) -> GeoPackage:
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            if raised[0] is None:
                with self._as_os_error():
                    if self.number:
                        self.file.execute(
                            "UPDATE gpkg_contents SET min_x = ?, min_y = ?, max_x = ?, max_y = ?",
                            self.bounds,
                        )
                    self.file.execute("COMMIT")
        finally:
            self.file.close()


def _quoted(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _describe(georeference: Georeference) -> tuple[str, int | None, str]:
    """Name, EPSG's number and WKT of a coordinate reference system."""
    from rasterio.crs import CRS  # which has read it

    crs = CRS.from_user_input(georeference.crs)
    return georeference.crs[:80], crs.to_epsg(), crs.to_wkt(version="WKT1_GDAL")


def projjson(georeference: Georeference) -> dict[str, Any]:
    """The coordinate reference system as GeoParquet names it."""
    from rasterio.crs import CRS  # which has read it

    return CRS.from_user_input(georeference.crs).to_dict(projjson=True)


class ParquetTable:
    """A Parquet file, compressed, in groups of rows; with a column ``geometry``, GeoParquet 1.1.

    Args:
        path: the file.
        columns: name and type (int, float, str or bytes) of each column.
    """

    def __init__(self, path: Path, columns: Mapping[str, type]):
        self.check_installed()
        import pyarrow
        from pyarrow import parquet

        types = {
            int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string(),
            bytes: pyarrow.binary(),
        }  # fmt: skip
        self.columns = columns
        self.schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self.file = parquet.ParquetWriter(path, self.schema, compression="zstd")
        self.pending: list[Mapping[str, Any]] = []
        self.crs: dict[str, Any] | None = None  # of the geometry, or unknown

    @staticmethod
    def check_installed() -> None:
        """Raises ImportError if pyarrow is missing."""
        try:
            import pyarrow.parquet  # noqa: F401  # what counts is whether it can be imported
        except ImportError as error:
            raise ImportError(
                "the format parquet needs pyarrow: pip install 'spatial-mamba-d2[parquet]'"
            ) from error

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows, which have a value for each column."""
        for row in rows:
            self.pending.append(row)
            if len(self.pending) == _ROWS_IN_GROUP:
                self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self.pending:
            table = pyarrow.Table.from_pylist(self.pending, schema=self.schema)
            self.file.write_table(table)
            self.pending = []

    def __enter__(self) -> ParquetTable:
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            if raised[0] is None:
                self._flush()
                if "geometry" in self.columns:
                    self.file.add_key_value_metadata({"geo": json.dumps(self._geo())})
        finally:
            self.file.close()

    def _geo(self) -> dict[str, Any]:
        column = {"encoding": "WKB", "geometry_types": ["MultiPolygon"], "crs": self.crs}
        return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
