"""Scenes of many cells: as many as asked for, annotated as drawn, the same on every machine."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from spatial_mamba_d2.data import cells
from spatial_mamba_d2.data.cells import generate_cells, render_scene
from spatial_mamba_d2.data.coco import load_coco

SMALL = {"image_px": 128, "num_objects": 40, "cell_px": 10}


def test_pixels_are_these_on_every_machine():
    # If a change is intended, increase GENERATOR_VERSION with it.
    scene = render_scene("train", 3, **SMALL)
    digest = hashlib.sha256(scene.image.tobytes() + scene.cells.tobytes()).hexdigest()
    assert digest == "dd183ab4a8da430a9143c76f28e86dfb5a8b7ab5cebbcc51c327c525ea08a147"
    assert cells.GENERATOR_VERSION == 1
    other = render_scene("val", 3, **SMALL)
    assert (other.image != scene.image).any()


def test_the_annotations_are_the_drawn_cells(tmp_path):
    """Each of them: its mask by COCO's own code, and nearly all of the ellipse is visible."""
    codec = pytest.importorskip("pycocotools.mask")
    root = generate_cells(tmp_path / "cells", num_train=2, num_val=1, **SMALL)
    content = json.loads((root / "instances_train.json").read_text())
    assert len(content["images"]) == 2 and len(content["annotations"]) == 80
    scene = render_scene("train", 1, **SMALL)
    mine = [a for a in content["annotations"] if a["image_id"] == 2]
    for number, annotation in enumerate(mine, 1):
        mask = scene.cells == number
        decoded = codec.decode(codec.merge(codec.frPyObjects(annotation["segmentation"], 128, 128)))
        assert np.array_equal(decoded.astype(bool), mask)
        assert annotation["area"] == mask.sum()
        x, y, width, height = annotation["bbox"]
        assert mask[y : y + height, x : x + width].sum() == mask.sum()
        assert mask.sum() > 0.9 * np.pi / 4 * width * height * 0.75
    dataset = load_coco(root / "instances_train.json", root / "images/training")
    assert [len(record["annotations"]) for record in dataset.records] == [40, 40]
    assert generate_cells(root, num_train=2, num_val=1, **SMALL) == root
    with pytest.raises(ValueError, match="root must be absent, empty, or hold sample data made"):
        generate_cells(root, num_train=3, num_val=1, **SMALL)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"image_px": 100}, "image_px must be at least 619 for 2000 cells of 11 pixels, got 100"),
        ({"num_objects": 0}, "num_objects must be at least 1, got 0"),
        ({"cell_px": 2}, "cell_px must be at least 8, got 2"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_val": 0}, "num_val must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        generate_cells(tmp_path / "cells", **{"cell_px": 11, **words})
