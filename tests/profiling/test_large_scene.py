"""The measurement of merging: it finds nothing wrong in right files, and what is planted."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("rasterio", reason="rasterio is not installed")
pytest.importorskip("pyogrio", reason="pyogrio is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.windows import Grid
from spatial_mamba_d2.profiling import large_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The numbers, what they should be found to be, and the folder of the predictions."""
    folder = tmp_path_factory.mktemp("scene")
    numbers = np.zeros((700, 900), np.int32)
    assert large_scene.draw_numbers(numbers, 60, 2) == 60
    large_scene.write_scene(numbers, folder / "scene.tif")
    options = Options(["coco", "geojson", "gpkg"], 0.0, 256, 32)
    predictor = Predictor(large_scene.Oracle())
    predict_files([folder / "scene.tif"], folder / "out", predictor, options)
    sizes = np.bincount(numbers.ravel())
    found = large_scene._rectangles(numbers)
    return numbers, sizes, np.array([found[i] for i in range(1, 61)]), folder / "out"


def test_nothing_is_wrong(scene):
    numbers, sizes, rectangles, folder = scene
    coco = json.loads((folder / "coco.json").read_text())
    assert large_scene.compare(sizes, numbers, coco) == {
        "lost": 0, "duplicates": 0, "lowest_iou": 1,
    }  # fmt: skip
    for name in ("geojson/scene.geojson", "gpkg/scene.gpkg"):
        found = large_scene.compare_coordinates(rectangles, sizes, numbers, folder / name)
        assert found == {"objects": 60, "not_right": 0, "largest_offset_px": 0}


def test_what_is_planted_is_found(scene, tmp_path):
    numbers, sizes, rectangles, folder = scene
    coco = json.loads((folder / "coco.json").read_text())
    first, second, *others = coco["annotations"]
    coco["annotations"] = [second, second, *others]
    found = large_scene.compare(sizes, numbers, coco)
    assert (found["lost"], found["duplicates"]) == (1, 1)

    content = json.loads((folder / "geojson/scene.geojson").read_text())
    for feature in content["features"][:3]:  # a quarter of a pixel to the right
        for polygon in (
            [feature["geometry"]["coordinates"]]
            if feature["geometry"]["type"] == "Polygon"
            else feature["geometry"]["coordinates"]
        ):
            for ring in polygon:
                ring[:] = [[x + 0.125, y] for x, y in ring]
    ring = content["features"][-1]["geometry"]["coordinates"][0]
    ring[:] = [[x, ring[0][1] + 1.5 * (y - ring[0][1])] for x, y in ring]
    (tmp_path / "scene.geojson").write_text(json.dumps(content))
    found = large_scene.compare_coordinates(rectangles, sizes, numbers, tmp_path / "scene.geojson")
    assert found["not_right"] >= 1 and found["objects"] <= 59
    assert found["largest_offset_px"] > 0.25
    content["features"].pop()
    (tmp_path / "scene.geojson").write_text(json.dumps(content))
    found = large_scene.compare_coordinates(rectangles, sizes, numbers, tmp_path / "scene.geojson")
    assert found == {"objects": 59, "not_right": 0, "largest_offset_px": 0.25}


def test_what_windows_cut():
    """Windows of 100 at 0, 80, 160, which share 20."""
    grid = Grid((260, 260), 100, 20)
    assert grid.tops == grid.lefts == [0, 80, 160]
    rectangles = np.array([
        (10, 10, 20, 20),  # in the first window alone
        (82, 10, 10, 10),  # in the margin, complete in both
        (70, 10, 20, 10),  # complete in the first one, cut by the second one
        (70, 10, 40, 10),  # complete in none
        (0, 30, 260, 10),  # larger than a window
    ])  # fmt: skip
    assert large_scene.describe(rectangles, grid) == {
        "objects": 5, "cut_by_a_window": 3, "complete_in_no_window": 2, "larger_than_a_window": 1,
    }  # fmt: skip
