"""Scores against an independent computation, pixel by pixel and class by class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatial_mamba_d2.data.class_indices import IGNORE
from spatial_mamba_d2.segmentation.metrics import Confusion, format_table


def brute_force(predictions, truths, num_classes):
    """mIoU, mAcc, aAcc in percent, by sets of pixels over all images."""
    predicted = np.concatenate([p.ravel() for p in predictions])
    true = np.concatenate([t.ravel() for t in truths])
    predicted, true = predicted[true != IGNORE], true[true != IGNORE]
    ious, accuracies = [], []
    for k in range(num_classes):
        either = np.sum((predicted == k) | (true == k))
        both = np.sum((predicted == k) & (true == k))
        if either:
            ious.append(both / either)
        if np.sum(true == k):
            accuracies.append(both / np.sum(true == k))
    return [100 * x for x in (np.mean(ious), np.mean(accuracies), np.mean(predicted == true))]


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_brute_force(seed):
    """Maps of several sizes with ignored pixels, a class in no map, one only predicted."""
    rng = np.random.default_rng(seed)
    confusion, predictions, truths = Confusion(7), [], []
    for _ in range(4):
        shape = rng.integers(1, 40, 2)
        truth = rng.choice([0, 1, 2, 3, 4, IGNORE], shape).astype(np.uint8)
        prediction = np.where(rng.random(shape) < 0.6, truth % 7, rng.integers(0, 6, shape))
        confusion.update(torch.from_numpy(prediction), torch.from_numpy(truth))
        predictions.append(prediction)
        truths.append(truth)
    expected = brute_force(predictions, truths, 7)
    assert list(confusion.scores().values()) == pytest.approx(expected, abs=1e-10)


def test_undefined_classes_are_no_zeros():
    confusion = Confusion(3)
    confusion.update(torch.tensor([[0, 0, 2]]), torch.tensor([[0, IGNORE, 0]]))
    iou, accuracy = confusion.per_class()
    assert iou.tolist()[0] == 50 and iou.isnan().tolist() == [False, True, False]
    assert accuracy.isnan().tolist() == [False, True, True]
    assert confusion.scores() == {"mIoU": 25.0, "mAcc": 50.0, "aAcc": 50.0}
    table = format_table(confusion, ["sky", "door, double", "sea"])
    assert [line.split()[-2:] for line in table.splitlines()[1:4]] == [
        ["50.00", "50.00"], ["-", "-"], ["0.00", "-"],
    ]  # fmt: skip


def test_counts_are_exact_beyond_float32():
    confusion = Confusion(2)
    confusion.matrix[0, 0] = 2**53
    confusion.update(torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(1, 3, dtype=torch.uint8))
    assert confusion.matrix[0, 0].item() == 2**53 + 3


def test_other_shape_is_named():
    with pytest.raises(ValueError, match=r"must have one shape, got \[2, 3\] and \[3, 2\]"):
        Confusion(2).update(torch.zeros(2, 3), torch.zeros(3, 2))
