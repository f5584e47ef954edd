"""Files of predictions: read back by others, the same whatever happened, and never over inputs."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.writers import FORMATS

HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
ALL = {
    task: [
        name
        for name, writer in FORMATS.items()
        if task in writer.tasks and (name != "parquet" or HAS_PYARROW)
    ]
    for task in ("detection", "segmentation", "classification")
}


@pytest.fixture
def photos(small_scene, tmp_path) -> Path:
    """Three images, in folders, the largest of which is larger than a window, and a broken one."""
    folder = tmp_path / "photos"
    write_image(folder / "a.png", small_scene.image)
    write_image(folder / "sub" / "a.png", small_scene.image[:200, :200])
    write_image(folder / "sub" / "b.png", small_scene.image[300:500, :200])
    (folder / "c.jpg").write_bytes(b"no image")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(photos, output, model, **options):
    task_formats = options.pop("formats", ALL[model.task])
    return predict_files([photos], output, Predictor(model), Options(task_formats, **options))


def test_detections_are_read_back_equal(photos, small_scene, oracle, tmp_path):
    summary = run(photos, tmp_path / "out", oracle(), window_px=256, score_thresh=0)
    assert summary["images"] == 3
    (skipped,) = summary["skipped"]
    assert skipped["image"].endswith("c.jpg") and "no image in a known format" in skipped["reason"]
    truth = Predictor(oracle())(small_scene.image, score_thresh=0)

    coco = COCO(tmp_path / "out/coco.json")
    ids = {image["file_name"]: image["id"] for image in coco.dataset["images"]}
    annotations = coco.loadAnns(coco.getAnnIds(ids[(photos / "a.png").as_posix()]))
    assert len(annotations) == len(truth)
    found = np.zeros(small_scene.numbers.shape, int)
    for annotation in annotations:
        found += coco.annToMask(annotation) * annotation["category_id"]
    assert np.array_equal(found, np.where(small_scene.numbers, small_scene.numbers % 3 + 1, 0))
    assert [c["name"] for c in coco.dataset["categories"]] == list(truth.names)

    with (tmp_path / "out/predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["image"] == str(photos / "a.png")]
    assert sorted(float(row["x1"]) for row in rows) == sorted(truth.boxes[:, 0].tolist())

    geometry = pytest.importorskip("shapely.geometry")
    collection = json.loads((tmp_path / "out/geojson/a.geojson").read_text())
    assert "crs" not in collection
    areas = [geometry.shape(f["geometry"]).area for f in collection["features"]]
    assert sorted(areas) == sorted(truth.areas().tolist())
    assert all(geometry.shape(f["geometry"]).is_valid for f in collection["features"])

    labelme = json.loads((tmp_path / "out/labelme/sub/a.json").read_text())
    image = (tmp_path / "out/labelme/sub" / labelme["imagePath"]).resolve()
    assert image == photos / "sub/a.png"
    assert (labelme["imageHeight"], labelme["imageWidth"]) == (200, 200)
    assert labelme["imageData"] is None and {s["shape_type"] for s in labelme["shapes"]} == {
        "polygon"
    }

    lines = (tmp_path / "out/yolo/labels/a.txt").read_text().splitlines()
    assert len(lines) == len(truth)
    for line in lines:
        number, *values = line.split()
        assert len(values) % 2 == 0 and all(0 <= float(value) <= 1 for value in values)
        points = np.array(values, float).reshape(-1, 2) * (600, 500)
        polygon = geometry.Polygon(points)
        inside = polygon.representative_point()
        assert small_scene.numbers[int(inside.y), int(inside.x)] % 3 in (int(number), 0)
    assert (tmp_path / "out/yolo/classes.txt").read_text().split() == list(truth.names)
    assert not (tmp_path / "out/png/a.png").exists()  # predicted by windows
    assert (tmp_path / "out/png/sub/a.png").exists()
    assert not (tmp_path / "out/.parts").exists()


def test_label_maps_are_read_back_equal(photos, small_scene, oracle, tmp_path):
    run(photos, tmp_path / "out", oracle("segmentation"), window_px=256)
    label = np.asarray(Image.open(tmp_path / "out/label/a.png"))
    assert np.array_equal(label, small_scene.numbers % 3)
    small = np.asarray(Image.open(tmp_path / "out/label/sub/a.png"))
    assert np.array_equal(small, small_scene.numbers[:200, :200] % 3)
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["pixels"]) for row in rows[:3]] == np.bincount(label.ravel()).tolist()


def test_class_scores(photos, oracle, tmp_path):
    run(photos, tmp_path / "out", oracle("classification"))
    rows = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert rows[0] == "image,rank,class,name,score" and len(rows) == 1 + 3 * 3


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_shards_give_the_same_bytes(photos, oracle, tmp_path, task, batch_size):
    options = {"window_px": 256, "batch_size": batch_size}
    run(photos, tmp_path / "one", oracle(task), **options)
    expected = content(tmp_path / "one")
    for count in (2, 3):
        output = tmp_path / f"shards{count}"
        for number in range(count, 0, -1):
            assert run(photos, output, oracle(task), **options, shard=(number, count)) == {}
            if number > 1:
                with pytest.raises(ValueError, match="is missing: a shard has not ended yet"):
                    run(photos, output, oracle(task), **options, merge=True)
        run(photos, output, oracle(task), **options, merge=True)
        assert content(output) == expected


# Each run is a copy of a process that has loaded everything and computed nothing.
SCRIPT = """
import os, pathlib, random, signal, sys, time
sys.path.insert(0, {tests!r})
from conftest import Oracle
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files

def start():
    child = os.fork()
    if child == 0:
        options = Options({formats!r}, window_px=256, resume=True)
        predict_files([{photos!r}], pathlib.Path({output!r}), Predictor(Oracle()), options)
        os._exit(0)
    return child

random.seed(0)
num_killed = 0
for i in range(20):
    child = start()
    time.sleep(random.uniform(0, 0.02 * (i + 1)))  # the first ones end no run, however fast it is
    os.kill(child, signal.SIGKILL)
    num_killed += os.waitpid(child, 0)[1] == signal.SIGKILL
assert os.waitpid(start(), 0)[1] == 0
print(num_killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(photos, oracle, tmp_path):
    run(photos, tmp_path / "one", oracle(), window_px=256)
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), photos=str(photos), output=str(tmp_path / "killed"),
        formats=ALL["detection"],
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 3
    assert content(tmp_path / "killed") == content(tmp_path / "one")


class Stop(BaseException):
    pass


@pytest.mark.parametrize("moment", [2, 5, 13, 15, 19])
def test_stopped_while_predicting_or_writing(photos, oracle, tmp_path, monkeypatch, moment):
    """Whatever call is the last one, the next run ends with the same bytes."""
    run(photos, tmp_path / "one", oracle(), window_px=256)
    calls = 0
    replace = Path.replace

    def stopping(self, target):
        nonlocal calls
        calls += 1
        if calls == moment:
            raise Stop
        return replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "replace", stopping)
        run(photos, tmp_path / "two", oracle(), window_px=256)
    with pytest.raises(ValueError, match="holds an unfinished run|exist already"):
        run(photos, tmp_path / "two", oracle(), window_px=256)
    run(photos, tmp_path / "two", oracle(), window_px=256, resume=True)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    model = oracle()
    model.change = None  # to predict would fail
    run(photos, tmp_path / "two", model, window_px=256, resume=True)


def test_other_settings_do_not_continue_a_run(photos, oracle, tmp_path):
    run(photos, tmp_path / "out", oracle(), window_px=256, shard=(1, 2))
    with pytest.raises(ValueError, match="has other window_px"):
        run(photos, tmp_path / "out", oracle(), window_px=128, shard=(2, 2))
    write_image(photos / "sub" / "d.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match="has other images"):
        run(photos, tmp_path / "out", oracle(), window_px=256, shard=(2, 2))


def test_nothing_is_written_over(photos, oracle, tmp_path):
    with pytest.raises(ValueError, match="output: must be another folder than the input"):
        run(photos, photos, oracle())
    output = tmp_path / "out"
    run(photos, output, oracle())
    before = content(output)
    with pytest.raises(ValueError, match="exist already"):
        run(photos, output, oracle())
    run(photos, output, oracle(), overwrite=True)
    assert content(output) == before
    link = photos / "link.png"
    link.symlink_to(photos / "a.png")
    (tmp_path / "linked/png").mkdir(parents=True)
    (tmp_path / "linked/png/a.png").symlink_to(photos / "a.png")
    with pytest.raises(ValueError, match="would be written over the input"):
        run(photos, tmp_path / "linked", oracle(), overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["coco", "xml"]}, "format must be among coco, .*, got xml"),
        ({"formats": []}, "format must be among .*, got none"),
        ({"formats": ["label"]}, "among coco.* for detection, got label"),
        ({"shard": (3, 2)}, "shard must be I/N with 1 <= I <= N, got 3/2"),
        ({"shard": (1, 2), "merge": True}, "merge .* without --shard"),
        ({"window_px": 64, "overlap_px": 40}, r"must be in 1 \.\. 32"),
    ],
)
def test_options_out_of_range(photos, oracle, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(photos, tmp_path / "out", oracle(), **options)


def test_no_image_at_all(oracle, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of 1 files could be read as an image: .*broken.png"):
        predict_files(
            [tmp_path / "broken.png"], tmp_path / "out", Predictor(oracle()), Options(["csv"])
        )


def test_a_disk_that_is_full(photos, oracle, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left on device"):
        patch.setattr(Path, "write_bytes", refuse)
        run(photos, tmp_path / "out", oracle())
    assert run(photos, tmp_path / "out", oracle(), resume=True)["images"] == 3
