"""The form of an evaluation of any task, its bootstrap, and the comparison of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NUM_SAMPLES = 200  # of the bootstrap
LEVEL = 0.95  # of intervals
_NUM_BINS = 10  # of a calibration


@dataclass
class Evaluation:
    """Scores of one model on one data set, from 0 to 1.

    Attributes:
        task: ``detection``, ``segmentation`` or ``classification``.
        main: name of the score that models are compared by.
        scores: by name; None where a score is undefined.
        samples: of the main score, over images drawn with repetition: ``float64[NUM_SAMPLES]``.
        per_class: a row for each class: ``name`` and scores.
        confusion: counts, rows the truth, columns the prediction; the last ones are background in
            detection.
        columns: names of the rows and columns of ``confusion``.
        curves: name -> points (x, y) of a chart.
        calibration: bins with ``confidence``, ``accuracy`` and ``number``.
        more: what only one task has, ready for JSON.
        worst: position of an image and a word why, the worst first.
        suspects: position of an image and a word: what may be errors of the labels.
    """

    task: str
    main: str
    scores: dict[str, float | None]
    samples: np.ndarray
    per_class: list[dict[str, Any]]
    confusion: np.ndarray
    columns: list[str]
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    calibration: list[dict[str, float]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    worst: list[tuple[int, str]] = field(default_factory=list)
    suspects: list[tuple[int, str]] = field(default_factory=list)

    @property
    def interval(self) -> tuple[float, float]:
        """In which the main score is, with a probability of :data:`LEVEL`."""
        return interval(self.samples)

    def as_json(self, files: Sequence[str]) -> dict[str, Any]:
        """All but the samples; ``files`` are those of the images. What is undefined is None."""
        low, high = map(_number, self.interval)
        return {
            "task": self.task,
            "main": self.main,
            "scores": {name: _number(value) for name, value in self.scores.items()},
            "interval": {"score": self.main, "level": LEVEL, "low": low,
                         "high": high, "bootstrap": NUM_SAMPLES},
            "per_class": [{k: _number(v) for k, v in row.items()} for row in self.per_class],
            "confusion": {"names": self.columns, "counts": self.confusion.tolist()},
            "curves": {name: [list(p) for p in points] for name, points in self.curves.items()},
            "calibration": self.calibration,
            "calibration_error": expected_error(self.calibration),
            **self.more,
            "worst": [{"file": files[i], "why": why} for i, why in self.worst],
            "suspects": [{"file": files[i], "why": why} for i, why in self.suspects],
        }  # fmt: skip


def _number(value: Any) -> Any:
    is_number = isinstance(value, (float, np.floating, np.integer))
    return (float(value) if np.isfinite(value) else None) if is_number else value


def interval(samples: np.ndarray) -> tuple[float, float]:
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return float("nan"), float("nan")
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap(num_images: int, score: Callable[[np.ndarray], float]) -> np.ndarray:
    """``score(weights)`` for images drawn with repetition, ``float64[NUM_SAMPLES]``.

    The draws depend on the number of images alone, so that two evaluations on the same images are
    paired. ``weights`` is ``int64[num_images]``: how often each image was drawn.
    """
    rng = np.random.default_rng(num_images)
    samples = np.empty(NUM_SAMPLES)
    for index in range(NUM_SAMPLES):
        drawn = rng.integers(num_images, size=num_images)
        samples[index] = score(np.bincount(drawn, minlength=num_images))
    return samples


def compare(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """How much better the second one is, by the main score on the same draws of images.

    Raises:
        ValueError: they are of different tasks or scores.
    """
    if (first.task, first.main) != (second.task, second.main):
        raise ValueError(
            f"runs must have one task and main score to be compared, got {first.task} "
            f"{first.main} and {second.task} {second.main}"
        )
    difference = second.samples - first.samples
    low, high = interval(difference)
    values = [evaluation.scores[evaluation.main] for evaluation in (first, second)]
    return {
        "score": first.main,
        "difference": (values[1] or 0.0) - (values[0] or 0.0),
        "low": low,
        "high": high,
        "level": LEVEL,
        "is_clear": bool(low > 0 or high < 0),
    }


def calibrate(confidence: np.ndarray, is_right: np.ndarray) -> list[dict[str, float]]:
    """Mean confidence and share of right answers in bins of equal width; empty ones are left out.

    Args:
        confidence: float[N], from 0 to 1.
        is_right: bool[N].
    """
    bins = np.minimum((confidence * _NUM_BINS).astype(int), _NUM_BINS - 1)
    numbers = np.bincount(bins, minlength=_NUM_BINS)
    sums = np.bincount(bins, confidence, minlength=_NUM_BINS)
    rights = np.bincount(bins, is_right, minlength=_NUM_BINS)
    return [
        {"confidence": float(s / n), "accuracy": float(r / n), "number": float(n)}
        for n, s, r in zip(numbers, sums, rights, strict=True)
        if n
    ]


def merge_calibrations(parts: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """One calibration of several, by their bins' numbers."""
    sums = np.zeros((_NUM_BINS, 3))
    for bin_ in (b for part in parts for b in part):
        place = min(int(bin_["confidence"] * _NUM_BINS), _NUM_BINS - 1)
        number = bin_["number"]
        sums[place] += number * bin_["confidence"], number * bin_["accuracy"], number
    return [{"confidence": c / n, "accuracy": a / n, "number": n} for c, a, n in sums.tolist() if n]


def expected_error(calibration: Sequence[Mapping[str, float]]) -> float | None:
    """Expected calibration error: the mean distance of confidence and accuracy."""
    total = sum(b["number"] for b in calibration)
    if not total:
        return None
    return sum(b["number"] * abs(b["confidence"] - b["accuracy"]) for b in calibration) / total
