"""Each format as the programs that it is for read it: the same objects, pixel by pixel."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files


@pytest.fixture
def photo(small_scene, tmp_path) -> Path:
    path = tmp_path / "photos/scene.png"
    write_image(path, small_scene.image)
    return path


def predict(photo, model, *formats, **options):
    options = Options(formats, score_thresh=0, **options)
    predict_files([photo], photo.parents[1] / "out", Predictor(model), options)
    return photo.parents[1] / "out"


def bitmaps(scene, *, only_largest=False):
    """Masks of the objects by number, without holes, of all their parts or the largest."""
    for number in range(1, scene.numbers.max() + 1):
        mask = (scene.numbers == number).astype(np.uint8)
        count, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        if count == 1:
            continue
        parts = sorted(range(1, count), key=lambda i: -statistics[i, cv2.CC_STAT_AREA])
        filled = np.zeros(mask.shape, bool)
        for part in parts[: 1 if only_largest else None]:
            # What the frame reaches around the part, by edges and corners, is outside of it.
            around = np.pad(labels != part, 1, constant_values=True).astype(np.uint8)
            _, regions = cv2.connectedComponents(around, connectivity=8)
            filled |= (regions != regions[0, 0])[1:-1, 1:-1]
        yield number, filled


def painted(polygons, size):
    """What another program draws: ``bool[H, W]``."""
    features = pytest.importorskip("rasterio.features", reason="rasterio is not installed")
    shapes = [{"type": "Polygon", "coordinates": [[*p, p[0]]]} for p in polygons]
    return features.rasterize([(shape, 1) for shape in shapes], size).astype(bool)


@pytest.mark.parametrize("task", ["detection", "segmentation", "classification"])
def test_pandas(photo, small_scene, oracle, task):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    model = Predictor(oracle(task))
    expected = model(photo, score_thresh=0).to_pandas()
    assert len(expected)
    output = predict(photo, oracle(task), "csv", "parquet")
    text = pandas.read_csv(output / "predictions.csv")
    table = pandas.read_parquet(output / "predictions.parquet")
    pandas.testing.assert_frame_equal(text, expected, check_dtype=False, check_exact=True)
    pandas.testing.assert_frame_equal(
        table[expected.columns], expected, check_dtype=False, check_exact=True
    )


@pytest.mark.parametrize("name", ["geojson/scene.geojson", "gpkg/scene.gpkg"])
def test_gdal(photo, small_scene, oracle, name):
    raw = pytest.importorskip("pyogrio.raw", reason="pyogrio is not installed")
    shapely = pytest.importorskip("shapely", reason="shapely is not installed")
    features = pytest.importorskip("rasterio.features", reason="rasterio is not installed")
    output = predict(photo, oracle(), "geojson", "gpkg", window_px=256)
    meta, _, geometries, values = raw.read(output / name)
    fields = dict(zip(meta["fields"], values, strict=True))
    shapes = shapely.from_wkb(geometries)
    assert len(shapes) == small_scene.num_objects and shapely.is_valid(shapes).all()
    assert [oracle().names[i] for i in fields["class"]] == list(fields["name"])
    found = features.rasterize(
        zip(shapes, fields["class"].astype(int) + 1, strict=True), small_scene.numbers.shape
    )
    numbers = small_scene.numbers
    assert np.array_equal(found, np.where(numbers, numbers % 3 + 1, 0))
    truth = Predictor(oracle())(photo, score_thresh=0)
    assert sorted(fields["score"]) == sorted(truth.scores.astype(float))


def test_labelme(photo, small_scene, oracle, monkeypatch):
    monkeypatch.setitem(os.environ, "QT_QPA_PLATFORM", "offscreen")
    labelme = pytest.importorskip(
        "labelme", reason="LabelMe is not installed", exc_type=ImportError
    )
    file = labelme.LabelFile(str(predict(photo, oracle(), "labelme") / "labelme/scene.json"))
    assert file.image_data == photo.read_bytes()  # found next to the labels
    assert {shape["shape_type"] for shape in file.shapes} == {"polygon"}
    scores = dict(enumerate(Predictor(oracle())(photo, score_thresh=0).scores.tolist()))
    objects: dict[object, list] = {}
    for index, shape in enumerate(file.shapes):
        group = shape["group_id"]
        objects.setdefault(("alone", index) if group is None else group, []).append(shape)
    assert len(objects) == small_scene.num_objects
    expected = bitmaps(small_scene)
    for (number, mask), shapes, score in zip(
        expected, objects.values(), scores.values(), strict=True
    ):
        found = painted([shape["points"] for shape in shapes], mask.shape)
        assert np.array_equal(found, mask)
        assert {shape["label"] for shape in shapes} == {oracle().names[number % 3]}
        assert {shape["other_data"]["score"] for shape in shapes} == {score}


def test_yolo_lines(photo, small_scene, oracle):
    """Class, and the outline in parts of the image's sides."""
    lines = (predict(photo, oracle(), "yolo") / "yolo/labels/scene.txt").read_text().splitlines()
    height, width = small_scene.numbers.shape
    expected = bitmaps(small_scene, only_largest=True)
    for line, (number, mask) in zip(lines, expected, strict=True):
        index, *values = line.split()
        assert int(index) == number % 3
        points = np.array(values, float).reshape(-1, 2) * (width, height)
        assert np.array_equal(painted([points.tolist()], mask.shape), mask)


@pytest.mark.parametrize("with_masks", [True, False])
def test_supervision_reads_yolo_files(photo, small_scene, oracle, with_masks):
    supervision = pytest.importorskip(
        "supervision", reason="supervision is not installed", exc_type=ImportError
    )
    model = oracle(with_masks=with_masks)
    output = predict(photo, model, "yolo")
    names = (output / "yolo/classes.txt").read_text().split()
    (output / "data.yaml").write_text(f"nc: {len(names)}\nnames: {names}\n")
    data = supervision.DetectionDataset.from_yolo(
        str(photo.parent), str(output / "yolo/labels"), str(output / "data.yaml")
    )
    assert data.classes == list(model.names) and len(data) == 1
    _, image, found = data[0]
    assert np.array_equal(image[..., ::-1], small_scene.image)
    truth = Predictor(oracle(with_masks=with_masks))(photo, score_thresh=0)
    assert found.class_id.tolist() == truth.classes.tolist()
    if with_masks:  # it rounds points, and draws their outline too
        pairs = list(zip(found.mask, bitmaps(small_scene, only_largest=True), strict=True))
        assert min((a & b).sum() / b.sum() for a, (_, b) in pairs) > 0.99
    else:
        assert np.abs(found.xyxy - truth.boxes).max() < 1e-3


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_boxes_and_drawings(photo, small_scene, oracle, task):
    """LabelMe's rectangles without masks, and drawings as Pillow reads them."""
    from PIL import Image

    from spatial_mamba_d2.data.json_file import read_json

    model = oracle(task, with_masks=False)
    formats = ["png", "labelme"] if task == "detection" else ["png", "label"]
    output = predict(photo, model, *formats)
    drawing = np.asarray(Image.open(output / "png/scene.png"))
    assert np.array_equal(drawing, 255 - small_scene.image)
    if task == "segmentation":
        label = np.asarray(Image.open(output / "label/scene.png"))
        assert np.array_equal(label, small_scene.numbers % 3)
        return
    shapes = read_json(output / "labelme/scene.json")["shapes"]
    truth = Predictor(oracle(with_masks=False))(photo, score_thresh=0)
    assert {shape["shape_type"] for shape in shapes} == {"rectangle"}
    points = np.array([shape["points"] for shape in shapes])
    assert np.array_equal(points.reshape(-1, 4), truth.boxes)
