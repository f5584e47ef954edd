"""Detectron2's keys: each has an effect here, or is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import spatial_mamba_d2.detection
from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.detection import unused_keys
from spatial_mamba_d2.detection.config import detection_defaults, load_config
from spatial_mamba_d2.detection.data import (
    build_train_loader,
    load_dataset,
    load_training_datasets,
)
from spatial_mamba_d2.detection.test_time_augmentation import AugmentedViews, without_resize
from spatial_mamba_d2.detection.trainer import Trainer
from spatial_mamba_d2.system.seeding import seed_all


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


DEFAULTS = dict(leaves(get_cfg()))


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return type(value)(value + 1)
    if isinstance(value, str):
        return f"{value}x"
    return 0.5 if value is None else (*value, *(value[-1:] or ("a",)))


@pytest.fixture(scope="module")
def readers():
    """The code that a training and an evaluation run, as one text."""
    theirs, ours = Path(detectron2.__path__[0]), Path(spatial_mamba_d2.detection.__path__[0])
    files = [*theirs.glob("modeling/**/*.py"), theirs / "solver/build.py", *ours.glob("*.py"),
             ours.parent / "config.py", theirs / "engine/defaults.py"]  # fmt: skip
    left_out = {"unused_keys.py", "config.py"}
    return "".join(f.read_text() for f in files if f.parent != ours or f.name not in left_out)


# Read in another way: the first by no code, the others one by one
READ_OTHERWISE = {"VERSION", "DATALOADER.SAMPLER_TRAIN", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE"}


def is_unused(key):
    return any(unused_keys.fnmatchcase(key, entry.pattern) for entry in unused_keys.UNUSED)


@pytest.mark.parametrize(("key", "value"), DEFAULTS.items(), ids=DEFAULTS)
def test_each_key_has_an_effect_or_is_refused(key, value, readers):
    if not is_unused(key):
        name = ".".join(key.split(".")[-2:])
        assert key in READ_OTHERWISE or re.search(rf"\b{re.escape(name)}\b", readers)
        return
    cfg = detection_defaults()
    cfg.MODEL.BACKBONE.NAME = "build_spatial_mamba_fpn_backbone"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    if key in ("SOLVER.GAMMA",):
        cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
    unused_keys.check_unused_keys(cfg, detection_defaults())
    node = cfg
    for part in key.split(".")[:-1]:
        node = node[part]
    node[key.split(".")[-1]] = other(value)
    with pytest.raises(ValueError, match=rf"must keep their defaults:\n  {key} .*: \w+"):
        unused_keys.check_unused_keys(cfg, detection_defaults())


@pytest.mark.parametrize(
    "words",
    [
        ("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
        ("MODEL.ROI_HEADS.NAME", "RROIHeads"),
        ("MODEL.MASK_ON", True, "MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 17),
        ("TEST.KEYPOINT_OKS_SIGMAS", [0.1], "MODEL.KEYPOINT_ON", True),
        ("TEST.AUG.ENABLED", True, "MODEL.KEYPOINT_ON", True),
        ("TEST.AUG.ENABLED", True, "MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("TEST.AUG.ENABLED", True, "MODEL.META_ARCHITECTURE", "PanopticFPN"),
        ("MODEL.POINT_HEAD.FC_DIM", 9),
        ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9),
        ("INPUT.RANDOM_FLIP", "vertical", "MODEL.KEYPOINT_ON", True),
        ("SOLVER.GAMMA", 0.5, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        ("MODEL.RESNETS.DEPTH", 101, "MODEL.BACKBONE.NAME", "build_spatial_mamba_fpn_backbone",
         "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_when_the_configuration_is_read(words):
    with pytest.raises(ValueError, match=f"must keep their defaults:\n  {words[0]}"):
        load_config(None, [*map(str, words)])


def test_keys_of_chosen_parts_are_accepted():
    for words in (
        ("MODEL.RESNETS.DEPTH", 101),
        ("SOLVER.BASE_LR_END", 1e-6, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        ("MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.4, 0.5, 0.6), "MODEL.ROI_HEADS.NAME",
         "CascadeROIHeads", "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.4],
         "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2,
         "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.2]),
    ):  # fmt: skip
        load_config(None, [*map(str, words)])


# --- keys that need code of ours -------------------------------------------------------------


def test_views_of_an_image(make_cfg):
    cfg = make_cfg("TEST.AUG.MIN_SIZES", (40, 60), "TEST.AUG.MAX_SIZE", 100)
    image = torch.arange(20 * 30).reshape(1, 20, 30).repeat(3, 1, 1).to(torch.uint8)
    views = AugmentedViews(cfg)({"image": image, "height": 20, "width": 30, "file_name": "a"})
    assert [tuple(v["image"].shape) for v in views] == [(3, 40, 60)] * 2 + [(3, 60, 90)] * 2
    assert torch.equal(views[0]["image"].flip(2), views[1]["image"])
    box = np.array([[3.0, 4.0, 9.0, 10.0]])
    for view in views:
        assert view["file_name"] == "a"
        transforms = view["transforms"]
        assert np.allclose(transforms.inverse().apply_box(transforms.apply_box(box)), box)
    assert views[1]["transforms"].apply_box(box).tolist() == [[42, 8, 54, 20]]
    assert without_resize(cfg).INPUT.MIN_SIZE_TEST == 0 != cfg.INPUT.MIN_SIZE_TEST


def test_evaluation_on_augmented_images(make_cfg, monkeypatch):
    """A detector that finds the truth in each view scores 100 in their union."""
    cfg = make_cfg("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64, 96), "TEST.PICTURES", 1)
    names = load_training_datasets(cfg)[0].classes
    (name,) = cfg.DATASETS.TEST
    records = {r["file_name"]: r for r in load_dataset(cfg, name, is_train=False).records}
    views = []

    def inference(self, inputs, detected_instances=None, do_postprocess=True):
        if detected_instances:  # the second pass: masks of the merged boxes
            for instances in detected_instances:
                instances.pred_masks = torch.ones(len(instances), 1, 28, 28)
            return detected_instances
        outputs = []
        for item in inputs:
            record, (height, width) = records[item["file_name"]], item["image"].shape[1:]
            views.append((item["file_name"], height, width))
            original = torch.from_numpy(read_image(item["file_name"])).float().mean(2)
            seen = torch.nn.functional.interpolate(
                item["image"].float().mean(0)[None, None], original.shape, mode="bilinear"
            )[0, 0]
            is_flipped = (seen - original.flip(1)).abs().mean() < (seen - original).abs().mean()
            objects = [a for a in record["annotations"] if not a["iscrowd"]]
            boxes = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4).float()
            boxes[:, 2:] += boxes[:, :2]
            if is_flipped:
                boxes[:, [0, 2]] = record["width"] - boxes[:, [2, 0]]
            boxes *= torch.tensor([width / record["width"], height / record["height"]]).repeat(2)
            instances = Instances((height, width), pred_boxes=Boxes(boxes))
            instances.scores = torch.full((len(boxes),), 0.9)
            instances.pred_classes = torch.tensor([a["category_id"] for a in objects]).long()
            outputs.append(instances)
        return outputs

    monkeypatch.setattr(GeneralizedRCNN, "inference", inference)
    results = Trainer.test_augmented(cfg, Trainer.build_model(cfg), names)
    assert set(results) == {"bbox_TTA", "segm_TTA"}
    assert results["bbox_TTA"]["AP"] > 99
    stored = json.loads(Path(cfg.OUTPUT_DIR, "scores_TTA.json").read_text())
    assert stored["protocol"] == (
        "test-time augmentation, short sides 64, 96, long side at most 4000, each with its mirror "
        "image; at most 100 detections for an image; pycocotools"
    )
    assert stored["bbox/AP"] == results["bbox_TTA"]["AP"] and stored["data"] == [name]
    assert len(views) == 4 * len(records) and len(set(views)) == 2 * len(records)
    assert len(list(Path(cfg.OUTPUT_DIR, "pictures_TTA").rglob("*.png"))) == 1


def test_precise_statistics_of_batch_norms(make_cfg):
    """The statistics at the end are means over NUM_ITER batches."""
    state = {}
    for enabled in (False, True):
        cfg = make_cfg("TEST.PRECISE_BN.ENABLED", enabled, "TEST.PRECISE_BN.NUM_ITER", 2,
                       "SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 0, "DATASETS.TEST_JSON", "",
                       "DATASETS.TEST_IMAGES", "", "DATASETS.TEST", ())  # fmt: skip
        seed_all(0)
        trainer = Trainer(cfg)
        trainer.train()
        state[enabled] = trainer.network.state_dict()
    changed = {key for key in state[True] if not torch.equal(state[True][key], state[False][key])}
    kinds = {key.rsplit(".", 1)[1] for key in changed}
    assert kinds == {"running_mean", "running_var", "num_batches_tracked"}


def test_images_of_training_are_shown(make_cfg):
    cfg = make_cfg("VIS_PERIOD", 1)
    batch = next(iter(build_train_loader(cfg, load_training_datasets(cfg))))
    with EventStorage(0) as storage:
        Trainer.build_model(cfg).train()(batch)
        assert any("bounding boxes" in name for name, *_ in storage._vis_data)


def test_crops_have_the_boxes_of_what_is_left_of_masks(make_cfg):
    cfg = make_cfg("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE",
                   (0.5, 0.5), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False,
                   "DATALOADER.NUM_WORKERS", 0)  # fmt: skip
    loader = iter(build_train_loader(cfg, load_training_datasets(cfg)))
    instances = [r["instances"] for _ in range(12) for r in next(loader)]
    assert any(len(i) for i in instances)
    for item in instances:
        if len(item):
            assert torch.equal(item.gt_boxes.tensor, item.gt_masks.get_bounding_boxes().tensor)
