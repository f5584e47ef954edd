"""Segmentation: intersection over union of areas and of boundaries, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from spatial_mamba_d2.data.class_indices import ignore_index
from spatial_mamba_d2.evaluation.evaluation import (
    Evaluation,
    bootstrap,
    calibrate,
    merge_calibrations,
)

_BOUNDARY = 0.02  # width of the band at boundaries, as a share of the image's diagonal
_LISTED = 16  # images
_SURE = 0.95  # probability from which a disagreement may be an error of the label
_LEAST_SUSPECT = 0.02  # share of an image's pixels


class LabelMapScores:
    """Counts images, one after the other, and evaluates them together.

    Args:
        names: of the classes.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.confusion = np.zeros((len(names), len(names)), np.int64)
        self._areas: list[np.ndarray] = []  # of each image: hit, true, predicted by class
        self._boundary = np.zeros((2, len(names)), np.int64)  # intersection, union
        self._calibrations: list[list[dict[str, float]]] = []
        self._suspect: list[float] = []

    def update(
        self, prediction: np.ndarray, truth: np.ndarray, confidence: np.ndarray | None = None
    ) -> None:
        """Count an image.

        Args:
            prediction: class indices, integers ``[H, W]``.
            truth: the same, with :func:`~.class_indices.ignore_index`.
            confidence: probability of the predicted class, float[H, W].

        Raises:
            ValueError: the shapes differ.
        """
        if prediction.shape != truth.shape:
            raise ValueError(
                f"prediction and truth must have one shape, got {prediction.shape} and "
                f"{truth.shape}"
            )
        number = len(self.names)
        counted = truth != ignore_index(number)
        cells = truth[counted].astype(np.int64) * number + prediction[counted]
        matrix = np.bincount(cells, minlength=number**2).reshape(number, number)
        self.confusion += matrix
        self._areas.append(np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)]))
        width = max(1, round(_BOUNDARY * float(np.hypot(*truth.shape))))
        for k in np.flatnonzero(self._areas[-1].any(axis=0)):
            bands = [_boundary((label == k) & counted, width) for label in (prediction, truth)]
            self._boundary[0, k] += np.count_nonzero(bands[0] & bands[1])
            self._boundary[1, k] += np.count_nonzero(bands[0] | bands[1])
        suspect = 0.0
        if confidence is not None and counted.any():
            is_right = prediction[counted] == truth[counted]
            self._calibrations.append(calibrate(confidence[counted], is_right))
            suspect = float((~is_right & (confidence[counted] >= _SURE)).mean())
        self._suspect.append(suspect)

    def evaluate(self) -> Evaluation:
        """Raises ValueError if no image was counted."""
        if not self._areas:
            raise ValueError("label maps must be of at least one image, got none")
        areas = np.stack(self._areas)  # [N, 3, K]
        iou = _iou(areas.sum(axis=0))
        hit, true, predicted = areas.sum(axis=0)
        with np.errstate(invalid="ignore"):
            accuracy = hit / true
            boundary = self._boundary[0] / self._boundary[1]
            precision = hit / predicted
        scores: dict[str, float | None] = {
            "mIoU": float(np.nanmean(iou)),
            "mAcc": float(np.nanmean(accuracy)),
            "aAcc": float(hit.sum() / max(1, true.sum())),
            "boundary mIoU": float(np.nanmean(boundary)),
        }
        rows = [
            {
                "name": name,
                "pixels": int(true[k]),
                "IoU": float(iou[k]),
                "accuracy": float(accuracy[k]),
                "precision": float(precision[k]),
                "boundary IoU": float(boundary[k]),
            }
            for k, name in enumerate(self.names)
        ]
        of_images = np.array([np.nanmean(_iou(a)) if a[1].any() else np.nan for a in areas])
        order = [int(i) for i in np.argsort(of_images, kind="stable") if np.isfinite(of_images[i])]
        suspects = [i for i in np.argsort(self._suspect, kind="stable")[::-1][:_LISTED]
                    if self._suspect[i] >= _LEAST_SUSPECT]  # fmt: skip
        return Evaluation(
            "segmentation",
            "mIoU",
            scores,
            bootstrap(len(areas), lambda w: float(np.nanmean(_iou(np.tensordot(w, areas, 1))))),
            rows,
            self.confusion,
            self.names,
            calibration=merge_calibrations(self._calibrations),
            worst=[(i, f"mIoU {of_images[i]:.3f}") for i in order[:_LISTED]],
            suspects=[
                (int(i), f"{self._suspect[i]:.1%} of the pixels: another class, surely")
                for i in suspects
            ],
        )


def _iou(areas: np.ndarray) -> np.ndarray:
    """Of hit, true and predicted areas, ``[3, K]``; NaN for a class that is in neither."""
    hit, true, predicted = areas.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return hit / (true + predicted - hit)


def _boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask within ``width`` of its outline, of which the image's edge is a part."""
    padded = np.pad(mask.astype(np.uint8), 1)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)
    return mask & (inner[1:-1, 1:-1] == 0)
