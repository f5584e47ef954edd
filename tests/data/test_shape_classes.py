"""The generated sample data of classification."""

from __future__ import annotations

import hashlib

import cv2
import pytest

from spatial_mamba_d2.data.shape_classes import generate_shape_classes
from spatial_mamba_d2.data.shapes import CLASSES


def hashes(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*.jpg")
    }


def test_every_class_has_its_images(tmp_path):
    root = generate_shape_classes(tmp_path / "a", num_train=3, num_val=2, image_px=24)
    found = hashes(root)
    names = [shape.name for shape in CLASSES]
    assert sorted(found) == sorted(
        f"{split}/{name}/{n:06d}.jpg"
        for split, num_images in (("train", 3), ("val", 2))
        for name in names
        for n in range(num_images)
    )
    assert len(set(found.values())) == len(found)
    assert all(cv2.imread(str(root / name)).shape == (24, 24, 3) for name in found)
    more = generate_shape_classes(tmp_path / "b", num_train=4, num_val=2, image_px=24)
    assert found.items() <= hashes(more).items()
    other = generate_shape_classes(tmp_path / "c", num_train=3, num_val=2, image_px=24, seed=1)
    assert not set(found.values()) & set(hashes(other).values())


def test_nothing_is_overwritten(tmp_path):
    root = tmp_path / "data"
    generate_shape_classes(root, num_train=1, num_val=1)
    before = hashes(root)
    generate_shape_classes(root, num_train=1, num_val=1)
    assert hashes(root) == before
    with pytest.raises(ValueError, match="root must be absent, empty, or hold .*'num_train': 2"):
        generate_shape_classes(root, num_train=2, num_val=1)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        generate_shape_classes(tmp_path / "own", num_train=1, num_val=1)


@pytest.mark.parametrize("name", ["num_train", "num_val", "image_px"])
def test_arguments_out_of_range(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be at least [18], got 0"):
        generate_shape_classes(tmp_path / "data", **{name: 0})
