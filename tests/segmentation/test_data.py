"""The data module of segmentation."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from spatial_mamba_d2.data.ade20k import load_split
from spatial_mamba_d2.data.images import read_size
from spatial_mamba_d2.data.label_format import LabelFormat
from spatial_mamba_d2.data.samplers import ResumableBatchSampler
from spatial_mamba_d2.data.segmentation_transforms import TestTransform, TrainTransform
from spatial_mamba_d2.segmentation.data import SegmentationData, TestImages

LABELS = LabelFormat(6)
MEAN_STD = {"mean": (127.0, 127.0, 127.0), "std": (64.0, 64.0, 64.0)}
TRAIN = TrainTransform(32, 64, (0.5, 2.0), 24, 0.75, flip=True, photometric=True, **MEAN_STD)
TEST = TestTransform(32, 64, (1.0,), **MEAN_STD)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(shapes, num_workers):
    data = SegmentationData(
        shapes, "training", "validation", LABELS, TRAIN, TEST,
        batch_size=2, num_workers=num_workers,
    )  # fmt: skip
    data.setup("fit")
    pairs = load_split(shapes, "training", LABELS)
    expected = data.training_samples(pairs)
    batches = ResumableBatchSampler(len(pairs), 2)
    for (images, targets), batch, _ in zip(
        data.train_dataloader(), batches, range(8), strict=False
    ):
        for i, sample in enumerate(batch):
            assert torch.equal(images[i], expected[sample][0])
            assert torch.equal(targets[i], expected[sample][1])
    samples = list(data.val_dataloader())
    assert [sample["index"] for sample in samples] == list(range(5))
    image = cv2.imread(samples[0]["file"])
    assert samples[0]["label"].shape == image.shape[:2]
    assert [min(view.shape[1:]) for view in samples[0]["views"]] == [32]


def test_a_broken_test_image_is_an_error_or_marked(shapes, tmp_path):
    pairs = load_split(shapes, "validation", LABELS)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(pairs[1].image.read_bytes()[:600])
    pairs[1] = pairs[1]._replace(image=broken)
    marked = TestImages(pairs, LABELS, TEST, "skip")
    assert "broken.jpg" in marked[1]["error"] and "views" not in marked[1]
    assert marked[0]["label"].dtype == torch.uint8
    assert np.isfinite(marked[0]["views"][0]).all()
    with pytest.raises(ValueError, match="broken.jpg"):
        TestImages(pairs, LABELS, TEST, "raise")[1]


def test_views_too_large_for_the_model_are_found_at_the_start(shapes, caplog):
    """The views of these images, 320 x 240 or smaller, scaled by 2."""
    transform = replace(TEST, scales=(1.0, 2.0), scales_of="image")

    def setup(max_px, on_error="raise"):
        data = SegmentationData(
            shapes, "training", "validation", LABELS, TRAIN, replace(transform, max_px=max_px),
            batch_size=2, num_workers=0, on_error=on_error,
        )  # fmt: skip
        data.setup("validate")
        return data

    sizes = [read_size(pair.image) for pair in load_split(shapes, "validation", LABELS)]
    views_px = sorted(4 * height * width for height, width in sizes)
    assert len(setup(views_px[-1]).val_dataloader()) == len(sizes)
    with pytest.raises(ValueError, match=r"at most .* pixels, TEST.MAX_WHOLE_PX, got .* slide"):
        setup(views_px[-1] - 1)
    data = setup(views_px[-1] - 1, "skip")
    left_out = views_px.count(views_px[-1])
    assert data.checked["validation"].left_out == {"too large": left_out}
    assert len(data.val_dataloader()) == len(sizes) - left_out
    assert "TEST.MAX_WHOLE_PX" in caplog.text
