"""Classification: accuracies, confusion, calibration, and images whose label may be wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spatial_mamba_d2.evaluation.evaluation import Evaluation, bootstrap, calibrate

_LISTED = 24  # images


def evaluate_classes(
    probabilities: np.ndarray, targets: np.ndarray, names: Sequence[str]
) -> Evaluation:
    """Evaluate the classes of images.

    Args:
        probabilities: float[N, K].
        targets: int[N].
        names: of the K classes.

    Raises:
        ValueError: there are no images, or the arrays do not fit together.
    """
    if not len(targets) or probabilities.shape != (len(targets), len(names)):
        raise ValueError(
            f"probabilities must be [{len(targets)}, {len(names)}] of at least one image, "
            f"got {list(probabilities.shape)}"
        )
    num_classes = len(names)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    predicted = order[:, 0]
    is_right = predicted == targets
    confusion = np.bincount(targets * num_classes + predicted, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    hit, true, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        precision, recall = hit / found, hit / true
        f1 = 2 * hit / (true + found)
    top5 = (order[:, :5] == targets[:, None]).any(axis=1)
    scores: dict[str, float | None] = {
        "top1": float(is_right.mean()),
        **({"top5": float(top5.mean())} if num_classes > 5 else {}),
        "mean recall": float(np.nanmean(recall)),
        "mean F1": float(np.nanmean(np.where(true > 0, np.nan_to_num(f1), np.nan))),
    }
    rows = [
        {
            "name": name,
            "images": int(true[k]),
            "precision": float(precision[k]),
            "recall": float(recall[k]),
            "F1": float(f1[k]),
        }
        for k, name in enumerate(names)
    ]
    confidence = probabilities.max(axis=1)
    of_target = probabilities[np.arange(len(targets)), targets]
    wrong = np.flatnonzero(~is_right)
    wrong = wrong[np.argsort(of_target[wrong] - confidence[wrong], kind="stable")]
    worst = [
        (int(i), f"{names[targets[i]]}, predicted {names[predicted[i]]} ({confidence[i]:.0%})")
        for i in wrong[:_LISTED]
    ]
    suspects = [(i, why) for i, why in worst if confidence[i] >= 0.9 and of_target[i] <= 0.05]
    return Evaluation(
        "classification",
        "top1",
        scores,
        bootstrap(len(targets), lambda weights: float((weights * is_right).sum() / weights.sum())),
        rows,
        confusion,
        list(names),
        calibration=calibrate(confidence, is_right),
        worst=worst,
        suspects=suspects,
    )
