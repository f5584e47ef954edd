"""Clean data give no finding, in every format; each planted fault is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data.checks import check_data
from spatial_mamba_d2.data.formats import read_data
from tests.data.checks import planted_faults_of_formats  # noqa: F401  adds to FAULTS
from tests.data.checks.planted_faults import FAULTS, edited
from tests.data.formats.test_reading import MAPS
from tests.data.formats.writers import INSTANCE_WRITERS, write_classes, write_maps


def shape_names(number: int) -> list[str]:
    return [f"thing {index}" for index in range(number)]


def write_label_maps(maps, root: Path, layout: str, num_classes: int = 6) -> Path:
    image, label, save, name_file, text = MAPS[layout]
    write_maps(maps, root, image, label, save)
    (root / name_file).write_text(text(shape_names(num_classes)))
    return root


@pytest.fixture(scope="session")
def bases(shape_source, shape_maps, sample_images, tmp_path_factory) -> dict[str, Path]:
    """A clean data set of each format, to copy."""
    folder = tmp_path_factory.mktemp("bases")
    roots = {}
    for name in ("coco", "yolo", "labelme", "voc"):
        roots[name] = folder / name
        roots[name].mkdir()
        INSTANCE_WRITERS[name][0](shape_source, roots[name])
    roots["masks"] = write_label_maps(shape_maps, folder / "masks", "palette")
    for file in (folder / "masks" / "labels").rglob("*.png"):  # grey, to be changed easily
        Image.fromarray(np.array(Image.open(file))).save(file)
    (folder / "masks" / "names.txt").rename(folder / "masks" / "classes.txt")
    roots["colours"] = write_label_maps(shape_maps, folder / "colours", "colours")
    (folder / "colours" / "masks").rename(folder / "colours" / "labels")
    samples = {
        split: [(f, f.parent.name) for f in sorted((sample_images / split).rglob("*.jpg"))]
        for split in ("train", "val")
    }
    roots["class_folders"] = write_classes(samples, folder / "class_folders")
    return roots


@pytest.mark.parametrize(
    "base", ["coco", "yolo", "labelme", "voc", "masks", "colours", "class_folders"]
)
def test_clean_data_have_no_finding(base, bases):
    report = check_data(read_data(bases[base]))
    assert report.findings == []
    assert report.num_images == (40 if base == "class_folders" else 17)
    assert report.num_objects > 0


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_generated_shapes_have_no_finding(task, shapes):
    assert check_data(read_data(shapes, task=task)).findings == []


@pytest.mark.parametrize("name", ["coco", "yolo", "labelme", "voc", "huggingface"])
def test_photos_have_no_finding(name, coco_source, tmp_path):
    if name == "huggingface":
        pytest.importorskip("datasets.features", reason="the package datasets is not installed")
    write, _ = INSTANCE_WRITERS[name]
    root = tmp_path / name
    root.mkdir()
    write(coco_source, root)
    assert check_data(read_data(root, extract_to=tmp_path / "extracted")).findings == []


def test_real_label_maps_have_no_finding(ade_maps, tmp_path):
    root = write_label_maps(ade_maps, tmp_path, "ade20k", 150)
    assert check_data(read_data(root)).findings == []


@pytest.mark.parametrize(
    ("base", "kind", "spoil"),
    [(base, kind, spoil) for base, _, kind, spoil in FAULTS],
    ids=[f"{base}-{name}" for base, name, _, _ in FAULTS],
)
def test_a_planted_fault_is_found(base, kind, spoil, bases, tmp_path):
    root = tmp_path / base
    shutil.copytree(bases[base], root)
    word = spoil(root)
    report = check_data(read_data(root))
    named = [f for f in report.findings if f.kind == kind and word in f.file + f.message]
    assert named, [f[:3] for f in report.findings]


def test_there_are_at_least_60_faults():
    names = [name for _, name, _, _ in FAULTS]
    assert len(names) == len(set(names)) >= 60


def test_photos_in_bgr(coco_source, tmp_path):
    INSTANCE_WRITERS["coco"][0](coco_source, tmp_path)
    for file in (tmp_path / "images").iterdir():
        pixels = np.asarray(Image.open(file).convert("RGB"))[..., ::-1]
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, quality=95)
    kinds = {f.kind for f in check_data(read_data(tmp_path)).findings}
    assert kinds == {"red and blue exchanged"}


def test_what_tools_write_differently_is_no_finding(bases, tmp_path):
    """Ids that are missing, numbers as strings, no area and no iscrowd: trainings understand it."""
    root = tmp_path / "coco"
    shutil.copytree(bases["coco"], root)
    with edited(root) as content:
        for annotation in content["annotations"]:
            for key in ("id", "area", "iscrowd"):
                del annotation[key]
            annotation["category_id"] = str(annotation["category_id"])
    report = check_data(read_data(root))
    assert report.findings == []
    assert any("numbered anew" in note for note in report.notes)
