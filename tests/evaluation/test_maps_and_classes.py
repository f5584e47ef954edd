"""Scores of label maps and classes, against torchmetrics or counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics import functional

from spatial_mamba_d2.evaluation import LabelMapScores, compare, evaluate_classes
from spatial_mamba_d2.evaluation.evaluation import calibrate, expected_error, merge_calibrations
from spatial_mamba_d2.evaluation.label_maps import _boundary

NAMES = ["sky", "road", "car", "tree"]


@pytest.fixture
def maps() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Prediction, truth with ignored pixels, and confidence."""
    rng = np.random.default_rng(0)
    found = []
    for height, width in ((40, 60), (33, 21), (50, 50), (1, 7)):
        truth = rng.integers(0, 3, (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)
        truth = truth[:height, :width].astype(np.uint8)
        prediction = np.where(rng.random(truth.shape) < 0.2, rng.integers(0, 3, truth.shape), truth)
        truth[rng.random(truth.shape) < 0.05] = 255
        found.append((prediction.astype(np.uint8), truth, rng.random(truth.shape)))
    return found


def evaluated(maps):
    scores = LabelMapScores(NAMES)
    for prediction, truth, confidence in maps:
        scores.update(prediction, truth, confidence)
    return scores.evaluate()


def test_label_maps_against_torchmetrics(maps):
    found = evaluated(maps)
    predictions, truths = (
        torch.from_numpy(np.concatenate([m[i].ravel() for m in maps]).astype(np.int64))
        for i in (0, 1)
    )
    options = {"num_classes": 4, "ignore_index": 255}
    iou = functional.jaccard_index(predictions, truths, "multiclass", average=None, **options)
    present = [row["pixels"] > 0 for row in found.per_class]
    assert present == [True, True, True, False]
    np.testing.assert_allclose([r["IoU"] for r in found.per_class[:3]], iou[:3], rtol=1e-6)
    assert np.isnan(found.per_class[3]["IoU"])
    assert found.scores["mIoU"] == pytest.approx(float(iou[:3].mean()), rel=1e-6)
    accuracy = functional.accuracy(predictions, truths, "multiclass", average="micro", **options)
    assert found.scores["aAcc"] == pytest.approx(float(accuracy), rel=1e-6)
    recall = functional.recall(predictions, truths, "multiclass", average=None, **options)
    np.testing.assert_allclose([r["accuracy"] for r in found.per_class[:3]], recall[:3], rtol=1e-6)
    matrix = functional.confusion_matrix(predictions, truths, "multiclass", **options)
    np.testing.assert_array_equal(found.confusion, matrix)


def test_boundaries_by_distances(maps):
    for prediction, _, _ in maps:
        mask = prediction == 1
        for width in (1, 3):
            padded = np.pad(mask, width)
            around = np.lib.stride_tricks.sliding_window_view(padded, [2 * width + 1] * 2)
            inner = around.all(axis=(2, 3))  # nothing else within that distance
            np.testing.assert_array_equal(_boundary(mask, width), mask & ~inner)


def test_worst_images_and_suspects(maps):
    found = evaluated(maps)
    of_images = [evaluated([m]).scores["mIoU"] for m in maps]
    assert [i for i, _ in found.worst] == list(np.argsort(of_images, kind="stable"))
    low, high = found.interval
    assert low <= found.scores["mIoU"] <= high
    prediction, truth, _ = maps[0]
    sure = [(prediction, truth, np.ones(truth.shape)), *maps[1:3]]
    assert evaluated(sure).suspects[0][0] == 0
    better = evaluated([(np.where(t == 255, 0, t), t, c) for _, t, c in maps])
    assert better.scores["mIoU"] == 1 and compare(found, better)["is_clear"]


def test_classes_against_torchmetrics():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (300, 8)))
    targets = torch.from_numpy(rng.integers(0, 7, 300))
    logits[torch.arange(300), targets] += 2
    probabilities = logits.softmax(1)
    names = [f"class {i}" for i in range(8)]
    found = evaluate_classes(probabilities.numpy(), targets.numpy(), names)
    options = {"task": "multiclass", "num_classes": 8}
    for name, k in (("top1", 1), ("top5", 5)):
        value = functional.accuracy(probabilities, targets, average="micro", top_k=k, **options)
        assert found.scores[name] == pytest.approx(float(value))
    for name, metric in (("precision", functional.precision), ("recall", functional.recall),
                         ("F1", functional.f1_score)):  # fmt: skip
        values = metric(probabilities, targets, average=None, **options)
        ours = np.nan_to_num([row[name] for row in found.per_class])
        np.testing.assert_allclose(ours, values, rtol=1e-6)
    matrix = functional.confusion_matrix(probabilities, targets, **options)
    np.testing.assert_array_equal(found.confusion, matrix)
    error = functional.calibration_error(probabilities, targets, n_bins=10, norm="l1", **options)
    assert expected_error(found.calibration) == pytest.approx(float(error), rel=1e-5)
    assert all(targets[i] != probabilities[i].argmax() for i, _ in found.worst)


def test_calibrations_add_up():
    rng = np.random.default_rng(1)
    confidence, is_right = rng.random(500), rng.random(500) < 0.5
    whole = calibrate(confidence, is_right)
    parts = merge_calibrations([calibrate(confidence[:200], is_right[:200]),
                                calibrate(confidence[200:], is_right[200:])])  # fmt: skip
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="probabilities must be"):
        evaluate_classes(np.ones((2, 3)), np.zeros(2, int), ["a", "b"])
    with pytest.raises(ValueError, match="one shape"):
        LabelMapScores(NAMES).update(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="at least one image"):
        LabelMapScores(NAMES).evaluate()
