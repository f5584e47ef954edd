"""The whole detector against the authors' Mask R-CNN in mmdetection, end to end.

The golden detections and images are not part of this repository.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from detectron2.modeling import detector_postprocess
from detectron2.modeling.meta_arch import rcnn

from spatial_mamba_d2.data.coco import read_image
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.predict import Predictor
from spatial_mamba_d2.ops._extension import without_compiled_kernels

ROUNDING = 2e-5  # of mask probabilities; 7e-6 was the most by which a differing pixel missed 0.5


@pytest.fixture(scope="module")
def golden_folder(root):
    folder = root.parent / "shared" / "golden"
    if not (folder / "maskrcnn_tiny.npz").is_file():
        pytest.skip(f"golden detections are not at {folder}")
    return folder


@pytest.fixture(scope="module")
def predictor(root, official_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "official.pth"
    torch.save({"state_dict": official_state("maskrcnn_tiny"), "meta": {}}, path)
    config = root / "configs/mask_rcnn_spatial_mamba_t.yaml"
    return Predictor(load_config(config, ["MODEL.WEIGHTS", str(path), "MODEL.DEVICE", "cpu"]))


def box_iou(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    inter = np.prod(np.clip(high - low, 0, None))
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


@pytest.fixture(params=["compiled", "plain"])
def operators(request):
    """Both kinds of operators, so far as there are compiled ones."""
    if request.param == "plain":
        with without_compiled_kernels():
            yield
    else:
        yield


def detect(predictor, pixels, resize, monkeypatch, mask_threshold):
    paste = partial(detector_postprocess, mask_threshold=mask_threshold)
    monkeypatch.setattr(rcnn, "detector_postprocess", paste)
    if resize:
        return predictor(pixels)
    height, width = pixels.shape[:2]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    with torch.no_grad():
        inputs = {"image": tensor, "height": height, "width": width}
        return predictor.model([inputs])[0]["instances"]


@pytest.mark.slow
@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize(
    ("case", "image"), [("a", "image_a"), ("b", "image_b"), ("b800", "image_b")]
)
def test_detections(case, image, golden_folder, predictor, monkeypatch):
    """``a`` and ``b`` go in as they are; ``b800`` through our resizing to 800 x 1333.

    A mask is a probability map cut at 0.5. Where ours is further from 0.5 than rounding reaches,
    every pixel of every mask is equal. Few are nearer: one of 96 pixels has one, at 0.5 + 6e-8,
    which by itself makes an IoU of 0.9896.
    """
    pixels = read_image(golden_folder / f"{image}.png")
    found, surely, possibly = (
        detect(predictor, pixels, case == "b800", monkeypatch, 0.5 + margin)
        for margin in (0.0, ROUNDING, -ROUNDING)
    )
    with np.load(golden_folder / "maskrcnn_tiny.npz") as content:
        expected = {
            k.removeprefix(f"{case}."): content[k] for k in content if k.startswith(f"{case}.")
        }
    width = int(expected["masks_shape"][-1])
    masks = np.unpackbits(expected["masks_packed"], axis=-1, count=width).astype(bool)
    boxes, labels = found.pred_boxes.tensor.numpy(), found.pred_classes.numpy()
    assert len(found) == len(expected["boxes"])
    for i, (box, label) in enumerate(zip(expected["boxes"], expected["labels"], strict=True)):
        same_class = np.flatnonzero(labels == label)
        j = max(same_class, key=lambda j, box=box: box_iou(boxes[j], box))
        assert np.abs(boxes[j] - box).max() < 0.5
        assert abs(found.scores[j].item() - expected["scores"][i]) < 1e-3
        inside, maybe = surely.pred_masks[j].numpy(), possibly.pred_masks[j].numpy()
        assert not (inside & ~masks[i]).any() and not (masks[i] & ~maybe).any()
        mask, clear = found.pred_masks[j].numpy(), inside | ~maybe
        assert (~clear).sum() <= max(1, 0.02 * masks[i].sum())
        union, differing = (mask | masks[i]).sum(), (mask ^ masks[i]).sum()
        assert differing <= max(1, 0.01 * union)
