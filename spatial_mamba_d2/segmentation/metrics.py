"""Intersection over union and accuracies from one confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from spatial_mamba_d2.data.class_indices import ignore_index
from spatial_mamba_d2.system.tables import console_table


class Confusion:
    """Counts pixels by true and predicted class, over images and then over processes.

    Attributes:
        matrix: ``int64 Tensor[K, K]``, rows the truth, columns the prediction.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Count one image.

        Args:
            prediction: class indices, integer ``Tensor[H, W]``.
            truth: class indices and :func:`~.class_indices.ignore_index`, integer ``Tensor[H, W]``.

        Raises:
            ValueError: the shapes differ.
        """
        if prediction.shape != truth.shape:
            raise ValueError(
                f"prediction and truth must have one shape, got {list(prediction.shape)} and "
                f"{list(truth.shape)}"
            )
        num_classes = len(self.matrix)
        counted = truth != ignore_index(num_classes)
        cells = truth[counted].long() * num_classes + prediction[counted].long()
        counts = torch.bincount(cells, minlength=num_classes**2)
        self.matrix += counts.view(num_classes, num_classes)

    def sum_over_processes(self) -> None:
        """Add the other processes' counts; once, after the last image."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.matrix)

    def per_class(self) -> tuple[Tensor, Tensor]:
        """IoU and accuracy of each class, in percent, ``float64 Tensor[K]``.

        NaN for a class in neither truth nor prediction, or not in the truth.
        """
        matrix = self.matrix.double().cpu()
        hit, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        return 100 * hit / (true + predicted - hit), 100 * hit / true

    def scores(self) -> dict[str, float]:
        """``mIoU``, ``mAcc``: means over classes that have them; ``aAcc``: share of all pixels."""
        iou, accuracy = self.per_class()
        pixels = 100 * self.matrix.diag().sum().double() / self.matrix.sum()
        return {
            "mIoU": iou.nanmean().item(),
            "mAcc": accuracy.nanmean().item(),
            "aAcc": pixels.item(),
        }


def format_table(confusion: Confusion, names: Sequence[str]) -> str:
    """IoU and accuracy of each class and overall, in percent; ``-`` if undefined."""

    def cell(percent: float) -> str:
        return f"{percent:7.2f}" if percent == percent else "-"

    iou, accuracy = (values.tolist() for values in confusion.per_class())
    rows = [(name, cell(i), cell(a)) for name, i, a in zip(names, iou, accuracy, strict=True)]
    scores = "  ".join(f"{name} {value:.2f}" for name, value in confusion.scores().items())
    return f"{console_table(('class', 'IoU', 'Acc'), rows)}\n{scores}"
