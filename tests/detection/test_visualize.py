"""Drawings after an evaluation: one for each image, whatever the images are called."""

from __future__ import annotations

import json

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.detection.visualize import VisualizationWriter


def test_equal_names_have_a_drawing_each(tmp_path):
    names = ["cam1/0001.png", "cam2/0001.png", "cam2/0001.jpg"]
    images = []
    for number, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_8_bit = path.suffix == ".jpg"
        pixels = np.full((20, 30), 208 if is_8_bit else number * 1000)
        cv2.imwrite(str(path), pixels.astype(np.uint8 if is_8_bit else np.uint16))
        images.append({"id": number, "file_name": name, "height": 20, "width": 30})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "val.json").write_text(json.dumps(content))
    metadata = Metadata(
        json_file=str(tmp_path / "val.json"), image_root=str(tmp_path / "images"),
        thing_classes=["a"], thing_dataset_id_to_contiguous_id={1: 0},
    )  # fmt: skip
    writer = VisualizationWriter(
        metadata, tmp_path / "out", 8, 0.5, value_range=PixelRange(0, 1000)
    )
    writer.reset()
    for image in images:
        record = {
            "file_name": str(tmp_path / "images" / image["file_name"]),
            "image_id": image["id"],
        }
        nothing = Instances((20, 30), pred_boxes=Boxes(torch.zeros(0, 4)))
        nothing.scores, nothing.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        writer.process([record], [{"instances": nothing}])
    expected = {"cam1/0001.png": 0, "cam2/0001.png.png": 255, "cam2/0001.jpg.png": 208}
    drawn = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*.png")}
    assert drawn.keys() == expected.keys()
    assert {name: read_image(path).mean() for name, path in drawn.items()} == expected
