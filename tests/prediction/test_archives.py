"""Images in tar files are predicted as if they were files; bad archives are skipped by name."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.archives import find_members
from spatial_mamba_d2.prediction.bulk import Options, predict_files

NAMES = ("a.png", "sub/a.png", "sub/b.png")


@pytest.fixture
def photos(small_scene, tmp_path) -> Path:
    folder = tmp_path / "photos"
    write_image(folder / "a.png", small_scene.image)
    write_image(folder / "sub/a.png", small_scene.image[:200, :200])
    write_image(folder / "sub/b.png", small_scene.image[300:500, :200])
    return folder


def pack(archive: Path, folder: Path, names=NAMES, mode: str = "w") -> Path:
    with tarfile.open(archive, mode) as file:
        for name in names:
            file.add(folder / name, name)
    return archive


def annotations(output: Path) -> tuple[list[str], list[dict]]:
    content = json.loads((output / "coco.json").read_text())
    return [image["file_name"] for image in content["images"]], content["annotations"]


@pytest.mark.parametrize("window_px", [None, 256])
def test_an_archive_is_like_a_folder(window_px, photos, oracle, tmp_path):
    """In one process, and in shards."""
    archive = pack(tmp_path / "photos.tar", photos)
    (photos / "notes.txt").write_text("no image")
    options = {"formats": ("coco", "png"), "score_thresh": 0, "window_px": window_px}
    for source, output in ((photos, "of_folder"), (archive, "of_archive")):
        predict_files([source], tmp_path / output, Predictor(oracle()), Options(**options))
    names, expected = annotations(tmp_path / "of_folder")
    found_names, found = annotations(tmp_path / "of_archive")
    assert found == expected and len(found) > 20
    assert found_names == [f"{archive}/{name}" for name in NAMES]
    assert names == [f"{photos}/{name}" for name in NAMES]
    drawings = sorted((tmp_path / "of_folder/png").rglob("*.png"))
    assert len(drawings) >= 2
    for drawing in drawings:
        name = drawing.relative_to(tmp_path / "of_folder/png")
        other = tmp_path / "of_archive/png/photos.tar" / name
        assert other.read_bytes() == drawing.read_bytes()
    for more in ({"shard": (1, 2)}, {"shard": (2, 2)}, {"merge": True}):
        predict_files(
            [archive], tmp_path / "shared", Predictor(oracle()), Options(**options, **more)
        )
    assert annotations(tmp_path / "shared")[1] == expected


def test_a_predictor_takes_an_archive(photos, oracle, tmp_path):
    archive = pack(tmp_path / "photos.tar", photos)
    predict = Predictor(oracle())
    results = list(predict(archive, score_thresh=0))
    assert [result.source for result in results] == [archive / name for name in NAMES]
    for result, name in zip(results, NAMES, strict=True):
        assert np.array_equal(result.boxes, predict(photos / name, score_thresh=0).boxes)


def test_the_last_of_equal_names_counts_as_for_tar(photos, tmp_path):
    archive = pack(tmp_path / "a.tar", photos, ("a.png", "sub/b.png"))
    with tarfile.open(archive, "a") as file:
        file.add(photos / "sub/a.png", "a.png")
    members = find_members(archive)
    assert [member.name for member in members] == ["sub/b.png", "a.png"]
    assert members[1].open().read() == (photos / "sub/a.png").read_bytes()


def test_bad_archives_are_named(photos, oracle, tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    good = pack(folder / "good.tar", photos, NAMES[1:])
    content = good.read_bytes()
    (folder / "cut_off.tar").write_bytes(content[: find_members(good)[1].offset + 50])
    pack(folder / "compressed.tar", photos, mode="w:gz")
    (folder / "none.tar").write_bytes(b"x" * 2000)
    with tarfile.open(folder / "outside.tar", "w") as file:
        entry = tarfile.TarInfo("../a.png")
        entry.size = 3
        file.addfile(entry, io.BytesIO(b"abc"))
    with tarfile.open(folder / "empty.tar", "w"):
        pass
    summary = predict_files([folder], tmp_path / "out", Predictor(oracle()), Options())
    reasons = {Path(s["image"]).name: s["reason"] for s in summary["skipped"]}
    assert summary["images"] == 2  # of good.tar
    for name, words in {
        "cut_off.tar": "unexpected end of data",
        "compressed.tar": "tar file that is not compressed",
        "none.tar": "tar file that is not compressed",
        "outside.tar": "must have names below it, got '../a.png'",
        "empty.tar": "must hold an image, got none",
    }.items():
        assert words in reasons[name] and f"archive file {folder / name}" in reasons.pop(name)
    assert not reasons
