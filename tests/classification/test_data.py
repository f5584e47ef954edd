"""The data module of classification."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2.classification.data import BROKEN, ClassificationData, TestImages
from spatial_mamba_d2.data.imagenet import (
    TrainTransform,
    build_test_transform,
    load_classes,
    load_split,
)
from spatial_mamba_d2.data.samplers import ResumableBatchSampler

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
TRAIN = TrainTransform(24, MEAN, STD, {"auto_augment": "rand-m9-mstd0.5-inc1"})
TEST = build_test_transform(36, 24, MEAN, STD)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(sample_images, num_workers):
    classes = load_classes("", sample_images, "train", 5)
    data = ClassificationData(
        sample_images, "train", "val", classes, TRAIN, TEST,
        batch_size=4, test_batch_size=8, num_workers=num_workers,
    )  # fmt: skip
    data.setup("fit")
    assert data.epoch_iterations == 6
    samples = data.training_samples(data.splits["train"])
    batches = ResumableBatchSampler(25, 4)
    for (images, targets), batch, _ in zip(
        data.train_dataloader(), batches, range(8), strict=False
    ):
        for image, target, sample in zip(images, targets, batch, strict=True):
            expected = samples[sample]
            assert torch.equal(image, expected[0]) and target == expected[1]
    evaluated = list(data.val_dataloader())
    assert [len(images) for images, _, _ in evaluated] == [8, 7]
    assert torch.cat([targets for _, targets, _ in evaluated]).tolist() == [
        target for target in range(5) for _ in range(3)
    ]
    assert all(not error for _, _, errors in evaluated for error in errors)


def test_broken_test_images_are_marked(sample_images, tmp_path):
    samples = load_split(sample_images, "val", load_classes("", sample_images, "train", 5))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(samples[3].path.read_bytes()[:-300])
    samples[3] = samples[3]._replace(path=broken)
    marked = TestImages(samples, TEST, "skip")
    assert [target for _, target, _ in marked] == [0, 0, 0, BROKEN, *[1] * 2, *[2] * 3, *[3] * 3,
                                                   *[4] * 3]  # fmt: skip
    assert "broken.jpg" in marked[3][2] and marked[3][0].shape == (3, 24, 24)
    with pytest.raises(ValueError, match="broken.jpg"):
        TestImages(samples, TEST, "raise")[3]
