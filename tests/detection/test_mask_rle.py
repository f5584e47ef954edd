"""Masks of many objects: encoded one by one, the same as Detectron2's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask

from spatial_mamba_d2.detection import mask_rle
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.data import build_test_loader, load_dataset
from spatial_mamba_d2.detection.mask_rle import MaskByMask, RleMasks, with_rle_masks
from spatial_mamba_d2.detection.trainer import Trainer
from spatial_mamba_d2.prediction.masks import encode_crop, paste_rle

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("density", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("size", "place", "shape"),
    [((9, 7), (2, 3), (4, 2)), ((9, 7), (0, 0), (9, 7)), ((9, 7), (5, 0), (4, 7)),
     ((1, 1), (0, 0), (1, 1)), ((6, 5), (0, 2), (6, 3)), ((4, 4), (0, 0), (0, 0))],
)  # fmt: skip
def test_a_crop_has_the_rle_of_the_complete_mask(size, place, shape, density):
    """Bit for bit, also where it touches the borders, so that runs cross columns."""
    crop = np.random.default_rng(0).random(shape) < density
    complete = np.zeros(size, np.uint8, order="F")
    complete[place[0] : place[0] + shape[0], place[1] : place[1] + shape[1]] = crop
    assert encode_crop(crop, *place, size) == coco_mask.encode(complete)


def test_pasted_as_by_detectron2():
    """Boxes inside, across borders, thin and as large as the image."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(40, 28, 28, generator=generator)
    corners = torch.rand(40, 2, 2, generator=generator) * torch.tensor([61.0, 47.0])
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 0.01], 1)
    boxes[:3] = torch.tensor([[0, 0, 61, 47], [10, 10, 10.2, 40], [60.9, 46.9, 61, 47]])
    expected = paste_masks_in_image(masks, Boxes(boxes), (47, 61))
    for mask, box, map_ in zip(masks, boxes, expected, strict=True):
        rle = paste_rle(mask, box, (47, 61))
        assert rle == coco_mask.encode(np.asfortranarray(map_.numpy(), np.uint8))


def test_a_field_of_instances():
    rles = [encode_crop(np.ones((n, n), bool), 0, 0, (4, 5)) for n in (1, 2, 3)]
    instances = Instances((4, 5), scores=torch.tensor([0.1, 0.9, 0.5]), pred_masks=RleMasks(rles))
    assert instances[instances.scores > 0.3].to("cpu").pred_masks.rles == rles[1:]
    assert instances[torch.tensor([2, 0])].pred_masks.rles == [rles[2], rles[0]]
    assert instances[1].pred_masks.rles == rles[1:2]
    assert [mask.sum() for mask in instances.pred_masks] == [1, 4, 9]


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_the_detections_are_detectron2s(heads, make_cfg, monkeypatch):
    """Of a random detector, in chunks, for the images of the test set."""
    monkeypatch.setattr(mask_rle, "_CHUNK", 7)
    cfg = make_cfg("MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
                   "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)  # fmt: skip
    model = Trainer.build_model(cfg).eval()
    fast = with_rle_masks(model)
    assert isinstance(fast, MaskByMask) and not fast.training
    (name,) = cfg.DATASETS.TEST
    for batch in build_test_loader(cfg, load_dataset(cfg, name, is_train=False)):
        with torch.no_grad():
            expected = model(batch)[0]["instances"]
        found = fast(batch)[0]["instances"]
        assert len(expected) > 20
        assert torch.equal(found.pred_classes, expected.pred_classes)
        torch.testing.assert_close(found.scores, expected.scores)
        torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        for mask, other in zip(found.pred_masks, expected.pred_masks, strict=True):
            assert (mask ^ other.numpy()).sum() <= 2  # probabilities next to the threshold
    assert model.roi_heads.mask_on


def test_an_image_without_objects(make_cfg):
    cfg = make_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    model = with_rle_masks(Trainer.build_model(cfg).eval())
    (output,) = model([{"image": torch.zeros(3, 64, 64), "height": 32, "width": 32}])
    assert len(output["instances"]) == 0 and len(output["instances"].pred_masks) == 0
    assert with_rle_masks(Trainer.build_model(make_cfg("MODEL.MASK_ON", False))).training


def test_scores_are_those_of_maps(make_cfg, monkeypatch):
    """Of the same detector, evaluated with Detectron2's maps, and drawn."""
    scores = {}
    for with_rle in (True, False):
        if not with_rle:
            monkeypatch.setattr("spatial_mamba_d2.detection.trainer.with_rle_masks", lambda m: m)
        torch.manual_seed(0)
        cfg = make_cfg("TEST.PICTURES", 1, "TEST.PICTURES_SCORE_THRESH", 0.1,
                       "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)  # fmt: skip
        results = Trainer.test(cfg, Trainer.build_model(cfg))
        scores[with_rle] = {k: v for task in results.values() for k, v in task.items()}
        detections = Path(cfg.OUTPUT_DIR, "inference/coco_instances_results.json").read_text()
        assert all(d["segmentation"]["size"] for d in json.loads(detections))
    assert scores[True] == pytest.approx(scores[False], nan_ok=True, abs=1e-3)


def test_the_profile_of_dense_scenes():
    cfg = load_config(CONFIGS / "profiles/dense.yaml")
    rpn, limit = cfg.MODEL.RPN, cfg.TEST.DETECTIONS_PER_IMAGE
    assert limit >= 2000
    assert rpn.POST_NMS_TOPK_TEST >= limit and rpn.PRE_NMS_TOPK_TEST >= limit
