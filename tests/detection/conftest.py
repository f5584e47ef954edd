"""A detector and data small enough for tests of behaviour."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from pycocotools.coco import COCO

from spatial_mamba_d2.detection.config import load_config


@pytest.fixture
def overrides(shapes, test_variant, tmp_path) -> list[str]:
    """``KEY VALUE`` pairs that put the demo configuration onto the small data and model."""
    pairs = {
        "DATASETS.TRAIN_JSON": shapes / "instances_train.json",
        "DATASETS.TRAIN_IMAGES": shapes / "images/training",
        "DATASETS.TEST_JSON": shapes / "instances_val.json",
        "DATASETS.TEST_IMAGES": shapes / "images/validation",
        "OUTPUT_DIR": tmp_path / "output",
        "MODEL.DEVICE": "cpu",
        "MODEL.SPATIAL_MAMBA.VARIANT": test_variant,
        "INPUT.MIN_SIZE_TRAIN": "(48, 64)",
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 6,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "TEST.PICTURES": 0,
    }
    return [str(word) for pair in pairs.items() for word in pair]


@pytest.fixture
def make_cfg(root, overrides) -> Callable:
    """``make_cfg(KEY, VALUE, ...)``: the small configuration."""

    def make(*more: object):
        words = [*overrides, *(str(word) for word in more)]
        return load_config(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml", words)

    return make


@pytest.fixture
def stuff(shapes, tmp_path):
    """Overrides for label maps of the sample: background is stuff, shapes are things."""
    table = np.zeros(256, np.uint8)
    table[[0, 1]] = 255, 1
    words = []
    for split, folder in (("TRAIN", "training"), ("TEST", "validation")):
        output = tmp_path / "stuff" / folder
        output.mkdir(parents=True)
        for path in (shapes / "annotations" / folder).glob("*.png"):
            label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(output / path.name), table[label])
        words += [f"DATASETS.{split}_SEM_SEG", output]
    return (*words, *STUFF)


@pytest.fixture
def keypoints(shapes, tmp_path):
    """Overrides for the sample with 17 keypoints on each object, all of one class."""
    words = []
    for split, name, folder in (("TRAIN", "train", "training"), ("TEST", "val", "validation")):
        path = with_keypoints(shapes / f"instances_{name}.json", tmp_path)
        words += [f"DATASETS.{split}_JSON", path, f"DATASETS.{split}_IMAGES",
                  shapes / "images" / folder]  # fmt: skip
    return (*words, *KEYPOINTS)


@pytest.fixture
def photos(coco_mini, tmp_path):
    """``photos(recipe)``: overrides for a few photos of COCO, with what a recipe trains on."""

    def of(recipe: str) -> list[object]:
        words: list[object] = []
        for split, name in (("TRAIN", "train"), ("TEST", "val")):
            content = json.loads((coco_mini / f"instances_{name}.json").read_text())
            content["images"] = content["images"][:3]
            ids = {image["id"] for image in content["images"]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
            path = tmp_path / f"photos_{name}.json"
            path.write_text(json.dumps(content))
            if recipe.startswith("panoptic"):
                words += [f"DATASETS.{split}_SEM_SEG", things_of(path, tmp_path / f"things_{name}")]
            if recipe.startswith("keypoint"):
                path = with_keypoints(path, tmp_path)
            words += [f"DATASETS.{split}_JSON", path, f"DATASETS.{split}_IMAGES",
                      coco_mini / "images"]  # fmt: skip
        more = {"panoptic": STUFF, "keypoint": KEYPOINTS}.get(recipe.partition("_")[0], ())
        return [*words, *more]

    return of


# What belongs to the label maps and keypoints above
STUFF = (
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 16,
)  # fmt: skip
KEYPOINTS = (
    "MODEL.ROI_HEADS.NUM_CLASSES", 1,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (32,),
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 1,
)  # fmt: skip


def with_keypoints(json_file: Path, folder: Path) -> Path:
    """A copy with keypoints along the diagonal of each box, all of one class."""
    content = json.loads(json_file.read_text())
    names = list(COCO_PERSON_KEYPOINT_NAMES)
    content["categories"] = [{"id": 1, "name": "person", "keypoints": names}]
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["category_id"] = 1
        annotation["keypoints"] = [
            value for i in range(17) for value in (x + width * i / 17, y + height * i / 17, 2)
        ]
    path = folder / f"keypoints_{json_file.stem}.json"
    path.write_text(json.dumps(content))
    return path


def things_of(json_file: Path, folder: Path) -> Path:
    """Label maps of a COCO file: things are 0, all else is one kind of stuff."""
    folder.mkdir()
    coco = COCO(str(json_file))
    for image in coco.dataset["images"]:
        label = np.ones((image["height"], image["width"]), np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]])):
            label[coco.annToMask(annotation) > 0] = 0
        cv2.imwrite(str(folder / Path(image["file_name"]).with_suffix(".png")), label)
    return folder
