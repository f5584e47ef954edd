"""GeoPackage and Parquet, read back by GDAL and pyarrow: the same pixels, in any system."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files

TRANSFORMS = {
    "north up": (0.5, 0, 500_000, 0, -0.5, 5_400_000),
    "rotated": (0.4, 0.3, 500_000, 0.3, -0.4, 5_400_000),
    "pixels of two sizes, south up": (0.25, 0, 500_000, 0, 2, 5_400_000),
}


def expected(scene):
    return np.where(scene.numbers, scene.numbers % 3 + 1, 0)


def painted(geometries, classes, size, transform=None):
    """What another program draws of well-known binary: classes + 1, ``uint8[H, W]``."""
    features = pytest.importorskip("rasterio.features", reason="rasterio is not installed")
    shapely = pytest.importorskip("shapely", reason="shapely is not installed")
    shapes = [shapely.from_wkb(wkb) for wkb in geometries]
    assert all(shape.is_valid for shape in shapes)
    values = [(shape, int(index) + 1) for shape, index in zip(shapes, classes, strict=True)]
    place = {} if transform is None else {"transform": transform}
    return features.rasterize(values, size, **place)


def geo_of(path):
    from pyarrow import parquet

    return json.loads(parquet.read_metadata(path).metadata[b"geo"])


@pytest.fixture
def raster(scene, tmp_path):
    """``raster(transform, crs)``: the scene as GeoTIFF."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")

    def write(transform, crs="EPSG:32633", name="scene.tif"):
        path = tmp_path / name
        height, width = scene.numbers.shape
        with rasterio.open(
            path, "w", driver="GTiff", count=3, height=height, width=width, dtype="uint8",
            crs=crs, transform=rasterio.Affine(*transform), photometric="rgb",
        ) as file:  # fmt: skip
            file.write(scene.image.transpose(2, 0, 1))
        return path

    return write


def predict(inputs, output, model, *formats, **options):
    options = Options(formats, window_px=256, score_thresh=0, **options)
    return predict_files(inputs, output, Predictor(model), options)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_geopackage_has_the_coordinates_of_the_raster(raster, scene, oracle, tmp_path, transform):
    raw = pytest.importorskip("pyogrio.raw", reason="pyogrio is not installed")
    import rasterio

    predict([raster(transform)], tmp_path / "out", oracle(), "gpkg", "parquet")
    meta, _, geometries, values = raw.read(tmp_path / "out/gpkg/scene.gpkg")
    assert meta["crs"] == "EPSG:32633" and meta["geometry_type"] == "MultiPolygon"
    fields = dict(zip(meta["fields"], values, strict=True))
    assert len(geometries) == scene.num_objects
    affine = rasterio.Affine(*transform)
    found = painted(geometries, fields["class"], scene.numbers.shape, affine)
    assert np.array_equal(found, expected(scene))
    assert [oracle().names[i] for i in fields["class"]] == fields["name"].tolist()
    truth = Predictor(oracle())(scene.image, score_thresh=0)
    assert sorted(fields["score"]) == pytest.approx(sorted(truth.scores))

    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = parquet.read_table(tmp_path / "out/predictions.parquet")
    geo = geo_of(tmp_path / "out/predictions.parquet")
    (column,) = geo["columns"].values()
    assert geo["primary_column"] == "geometry"
    assert column["crs"]["id"] == {"authority": "EPSG", "code": 32633}
    assert set(table["crs"].to_pylist()) == {"EPSG:32633"}
    found = painted(
        table["geometry"].to_pylist(), table["class"].to_pylist(), scene.numbers.shape, affine
    )
    assert np.array_equal(found, expected(scene))


def test_a_system_without_a_number_is_kept(raster, oracle, tmp_path):
    raw = pytest.importorskip("pyogrio.raw", reason="pyogrio is not installed")
    import rasterio

    crs = rasterio.crs.CRS.from_proj4("+proj=laea +lat_0=10 +lon_0=20 +x_0=5 +datum=WGS84")
    path = raster(TRANSFORMS["north up"], crs)
    predict([path], tmp_path / "out", oracle(), "gpkg", "geojson")
    meta, *_ = raw.read(tmp_path / "out/gpkg/scene.gpkg")
    assert rasterio.crs.CRS.from_user_input(meta["crs"]) == crs


def test_a_geopackage_without_coordinates_is_in_pixels(small_scene, oracle, tmp_path):
    raw = pytest.importorskip("pyogrio.raw", reason="pyogrio is not installed")
    write_image(tmp_path / "scene.png", small_scene.image)
    predict([tmp_path / "scene.png"], tmp_path / "out", oracle(), "gpkg")
    path = tmp_path / "out/gpkg/scene.gpkg"
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert file.execute("PRAGMA foreign_key_check").fetchall() == []
        bounds = file.execute("SELECT min_x, min_y, max_x, max_y FROM gpkg_contents").fetchone()
    file.close()
    boxes = Predictor(oracle())(small_scene.image, score_thresh=0).boxes
    assert bounds == (*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0))
    meta, _, geometries, values = raw.read(path)
    classes = values[list(meta["fields"]).index("class")]
    found = painted(geometries, classes, small_scene.numbers.shape)
    assert np.array_equal(found, expected(small_scene))


def test_no_objects(oracle, tmp_path):
    write_image(tmp_path / "empty.png", np.zeros((50, 60, 3), np.uint8))
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    predict([tmp_path / "empty.png"], tmp_path / "out", oracle(), "gpkg", "parquet")
    from pyarrow import parquet

    assert parquet.read_table(tmp_path / "out/predictions.parquet").num_rows == 0
    with sqlite3.connect(tmp_path / "out/gpkg/empty.gpkg") as file:
        assert file.execute("SELECT count(*) FROM empty").fetchone() == (0,)
    file.close()


@pytest.mark.parametrize("task", ["detection", "segmentation", "classification"])
def test_parquet_has_the_rows_of_csv(small_scene, oracle, tmp_path, task):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    from pyarrow import csv

    write_image(tmp_path / "a.png", small_scene.image)
    write_image(tmp_path / "b.png", small_scene.image[:90])
    inputs = [tmp_path / "a.png", tmp_path / "b.png"]
    options = Options(["csv", "parquet"], score_thresh=0)
    predict_files(inputs, tmp_path / "out", Predictor(oracle(task)), options)
    rows = parquet.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    text = csv.read_csv(tmp_path / "out/predictions.csv").to_pylist()
    assert [{key: row[key] for key in text[0]} for row in rows] == text
    if task == "detection":
        assert {row["crs"] for row in rows} == {"pixels"}


def test_images_of_several_systems(raster, oracle, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    place = TRANSFORMS["north up"]
    paths = [raster(place), raster(place, "EPSG:32634", "other.tif")]
    predict(paths, tmp_path / "out", oracle(), "parquet")
    table = parquet.read_table(tmp_path / "out/predictions.parquet")
    assert geo_of(tmp_path / "out/predictions.parquet")["columns"]["geometry"]["crs"] is None
    assert set(table["crs"].to_pylist()) == {"EPSG:32633", "EPSG:32634"}


def test_a_full_disk_is_named(small_scene, oracle, tmp_path):
    """The limit of a file's size stands for it."""
    resource = pytest.importorskip("resource")
    from spatial_mamba_d2.prediction.vector_files import GeoPackage

    square = np.array([(0.0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with (
            pytest.raises(OSError, match="SQLite: "),
            GeoPackage(tmp_path / "x.gpkg", "x", {"n": "INTEGER"}, None) as file,
        ):
            file.write(([[square]], (i,)) for i in range(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
