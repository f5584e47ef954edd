"""GeoTIFF through rasterio: by windows, with coordinates, nodata and damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("rasterio", reason="rasterio is not installed")

import rasterio

from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.sources import GeoRaster, open_raster
from spatial_mamba_d2.prediction.windows import Window

TRANSFORM = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_400_000)


@pytest.fixture
def write(tmp_path):
    """``write(bands uint[C, H, W], crs, **profile)``: a tiled GeoTIFF."""

    def write(bands, crs="EPSG:32633", name="scene.tif", **profile):
        path = tmp_path / name
        place = {"crs": crs, "transform": TRANSFORM} if crs else {}
        with rasterio.open(
            path, "w", driver="GTiff", count=len(bands), height=bands.shape[1],
            width=bands.shape[2], dtype=bands.dtype, tiled=True, blockxsize=128, blockysize=128,
            compress="deflate", **place, **profile,
        ) as file:  # fmt: skip
            file.write(bands)
        return path

    return write


def predict(path, output, model, formats, **options):
    options = Options(formats, window_px=256, **options)
    return predict_files([path], output, Predictor(model), options)


def test_coordinates_of_objects(write, scene, oracle, tmp_path):
    path = write(scene.image.transpose(2, 0, 1), photometric="rgb")
    predict(path, tmp_path / "out", oracle(), ["geojson"], score_thresh=0)
    content = json.loads((tmp_path / "out/geojson/scene.geojson").read_text())
    assert content["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    assert len(content["features"]) == scene.num_objects
    geometries = [feature["geometry"] for feature in content["features"]]
    # Painted back by another program, all pixels are those of the scene.
    from rasterio.features import rasterize

    values = [(g, f["properties"]["class"] + 1)
              for g, f in zip(geometries, content["features"], strict=True)]  # fmt: skip
    painted = rasterize(values, scene.numbers.shape, transform=TRANSFORM)
    assert np.array_equal(painted, np.where(scene.numbers, scene.numbers % 3 + 1, 0))
    geometry = pytest.importorskip("shapely.geometry")
    for shape in map(geometry.shape, geometries):
        assert shape.is_valid and shape.exterior.is_ccw


def test_label_maps_have_the_coordinates_of_the_raster(write, scene, oracle, tmp_path):
    image = scene.image.copy()
    mask = np.full(scene.numbers.shape, 255, np.uint8)
    mask[:300, :300] = 0
    path = write(image.transpose(2, 0, 1), photometric="rgb")
    with rasterio.open(path, "r+") as file:
        file.write_mask(mask)
    predict(path, tmp_path / "out", oracle("segmentation"), ["label", "csv"])
    with rasterio.open(tmp_path / "out/label/scene.tif") as file:
        assert file.crs.to_epsg() == 32633 and file.transform == TRANSFORM
        assert file.nodata == 255 and file.block_shapes == [(256, 256)]
        label = file.read(1)
    # Only the window at the top left has nothing but nodata.
    assert (label[:161, :168] == 255).all()
    assert np.array_equal(label[161:], scene.numbers[161:] % 3)


def test_a_raster_without_coordinates(write, scene, oracle, tmp_path):
    path = write(scene.image.transpose(2, 0, 1), crs=None, photometric="rgb")
    good = write(scene.image.transpose(2, 0, 1), name="good.tif", photometric="rgb")
    options = Options(["geojson"], window_px=256)
    summary = predict_files([path, good], tmp_path / "out", Predictor(oracle()), options)
    assert summary["in_pixels"] == [path.as_posix()] and summary["images"] == 2
    assert predict(path, tmp_path / "text", oracle(), ["csv"])["in_pixels"] == []
    content = json.loads((tmp_path / "out/geojson/scene.geojson").read_text())
    assert "crs" not in content
    points = np.concatenate([np.reshape(f["geometry"]["coordinates"][0], (-1, 2))
                             for f in content["features"]])  # fmt: skip
    assert points.min() >= 0 and points[:, 0].max() <= 1100 and points[:, 1].max() <= 900


def test_a_truncated_file_is_named_and_the_rest_is_done(write, scene, oracle, tmp_path):
    path = write(scene.image.transpose(2, 0, 1), photometric="rgb", interleave="pixel")
    with rasterio.open(path) as file:
        assert file.read().any()
    content = path.read_bytes()
    whole = tmp_path / "whole.tif"
    whole.write_bytes(content)
    path.write_bytes(content[: len(content) * 2 // 3])
    summary = predict_files(
        [path, whole], tmp_path / "out", Predictor(oracle()), Options(["csv"], window_px=256)
    )
    reasons = [item["reason"] for item in summary["skipped"]]
    assert summary["images"] >= 1 and reasons
    assert all("scene.tif" in reason for reason in reasons)


def test_deep_values_need_a_range(write, oracle):
    bands = np.linspace(0, 4000, 3 * 40 * 50).reshape(3, 40, 50)
    path = write(bands.astype(np.uint16))
    with pytest.raises(ValueError, match="scene.tif has values of uint16: INPUT.PIXEL_RANGE"):
        open_raster(path, 3, None)
    pixels = open_raster(path, 3, PixelRange(1000, 3000)).read(Window(5, 10, 30, 40))
    expected = ((bands.astype(np.uint16).clip(1000, 3000) - 1000.0) * 255 / 2000).round()
    assert np.array_equal(pixels, expected.transpose(1, 2, 0)[5:30, 10:40])
    floats = write(np.where(bands < 100, np.nan, bands).astype(np.float32), name="float.tif")
    pixels = open_raster(floats, 3, PixelRange(1000, 3000)).read(Window(0, 0, 40, 50))
    assert pixels[0, 0, 0] == 0 and pixels.dtype == np.uint8


@pytest.mark.parametrize(("count", "channels"), [(1, 3), (4, 4), (2, 2), (1, 1)])
def test_bands(write, count, channels):
    bands = np.random.default_rng(0).integers(1, 255, (count, 20, 30), np.uint8)
    raster = open_raster(write(bands), channels, None)
    assert isinstance(raster, GeoRaster) and raster.size == (20, 30)
    pixels = raster.read(Window(0, 0, 20, 30))
    expected = np.repeat(bands, 3, axis=0) if (count, channels) == (1, 3) else bands
    assert np.array_equal(pixels, expected.transpose(1, 2, 0))


def test_other_bands_are_refused(write):
    bands = np.zeros((5, 20, 30), np.uint8)
    with pytest.raises(ValueError, match="has 5 bands, the model takes 3 channels"):
        open_raster(write(bands), 3, None)


# Reads a raster by windows, and prints by how many MB the process grows.
GROWTH = """
import sys
from pathlib import Path
from spatial_mamba_d2.prediction import sources
from spatial_mamba_d2.prediction.windows import Grid
from spatial_mamba_d2.profiling.memory import peak_memory_mb, reset_peak_memory_mb

sources._CACHE_BYTES = 8 << 20
raster = sources.open_raster(Path(sys.argv[1]), 3, None)
grid = Grid(raster.size, 512, 64)
raster.read(grid[0])
before = reset_peak_memory_mb()
assert all(raster.read(window) is not None for window in grid)
print(peak_memory_mb() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is measured on Linux only")
@pytest.mark.parametrize("limit", [None, "200"], ids=["ours", "GDAL_CACHEMAX"])
def test_decoded_blocks_do_not_stay_in_memory(write, limit):
    """75 MB of them, of which GDAL would keep 5 % of the machine's memory."""
    path = write(np.tile(np.arange(1, 251, dtype=np.uint8), (3, 5000, 20)), photometric="rgb")
    environment = {name: value for name, value in os.environ.items() if name != "GDAL_CACHEMAX"}
    if limit is not None:
        environment["GDAL_CACHEMAX"] = limit  # MB, by the user
    line = [sys.executable, "-c", GROWTH, path]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (float(done.stdout) < 40) == (limit is None), done.stdout
