"""Places where nothing more can be written: named, and the run continues when there is room."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files

FORMATS = ["coco", "csv", "geojson", "gpkg", "labelme", "yolo"]
# On a file system of a few KB, then of many: what each attempt says.
PROGRAM = """
import json, subprocess, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from conftest import Oracle
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.bulk import Options, predict_files

photos, place = Path(sys.argv[1]), Path(sys.argv[2])
said = []
for options in ["size=150k", "ro", "size=560k", "size=50m"]:
    options = options if options == "ro" else f"rw,{{options}}"
    subprocess.run(["mount", "-o", f"remount,{{options}}", place], check=True)
    try:
        options = Options({formats!r}, score_thresh=0, window_px=128, resume=True)
        summary = predict_files([photos], place / "out", Predictor(Oracle()), options)
        said.append(str(summary["images"]))
    except (OSError, ValueError) as error:
        said.append(str(error))
print(json.dumps([said, {{
    str(path.relative_to(place / "out")): path.read_bytes().hex()
    for path in (place / "out").rglob("*") if path.is_file()
}}]))
"""


@pytest.fixture
def on_small_disk(tmp_path):
    """``on_small_disk(WORD, ...)``: a program, and the place of a file system of 150 KB."""
    place = tmp_path / "place"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=150k none {place}"
    space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*space, mount], capture_output=True).returncode
    ):
        pytest.skip("this system does not let a process mount a file system of its own")

    def run(*words):
        done = subprocess.run(
            [*space, f'{mount} && exec "$@"', "sh", *map(str, words), str(place)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_a_disk_that_is_full_or_cannot_be_written(small_scene, oracle, tmp_path, on_small_disk):
    photos = tmp_path / "photos"
    for name in "abcd":
        write_image(photos / f"{name}.png", small_scene.image)
    program = PROGRAM.format(tests=str(Path(__file__).parent), formats=FORMATS)
    said, files = json.loads(on_small_disk(sys.executable, "-c", program, photos))
    parts, read_only, results, end = said
    assert "/out/.parts/000000/" in parts and "cannot be written: No space left" in parts
    assert read_only.startswith("output: the folder") and "cannot be written" in read_only
    assert "/out/.parts" not in results and "cannot be written: No space left" in results
    assert end == "4"

    options = Options(FORMATS, score_thresh=0, window_px=128)
    predict_files([photos], tmp_path / "other/out", Predictor(oracle()), options)
    expected = {
        str(path.relative_to(tmp_path / "other/out")): path.read_bytes().hex()
        for path in (tmp_path / "other/out").rglob("*")
        if path.is_file()
    }
    assert files == expected
