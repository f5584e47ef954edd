"""What is exported: a network as one function of images, and all that is known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tolerance:
    """The largest differences between a file and PyTorch that are accepted.

    Attributes:
        relative: of probabilities, relative to the largest one.
        margin: two scores that are nearer to each other, or to a threshold, are undecided.
        box_px: of the corners of boxes, in pixels.
        score: of the scores of detections.
        mask_iou: the least IoU of two masks.
    """

    relative: float = 1e-4
    margin: float = 1e-3
    box_px: float = 0.05
    score: float = 1e-4
    mask_iou: float = 0.99


@dataclass(frozen=True)
class Difference:
    """How far apart two answers are in one respect, and how far they may be."""

    name: str
    value: float
    limit: float

    @property
    def is_accepted(self) -> bool:
        return self.value <= self.limit  # false for NaN

    def __str__(self) -> str:
        return f"{self.name} {self.value:.1e} (at most {self.limit:.0e})"


Compare = Callable[[Outputs, Outputs, Tolerance], list[Difference]]


@dataclass(frozen=True)
class Exportable:
    """A network with everything from pixels to predictions inside, except resizing.

    Attributes:
        module: of standard operators: ``uint8 Tensor[B, H, W, C]``, or ``[H, W, C]`` if it takes a
            single image, -> a tensor for each of ``outputs``.
        native: the same over our own operators, for AOTInductor; None if it must not be compiled.
        reference: the answer of the original model in PyTorch to the same input. It may have
            further tensors, which ``compare`` needs.
        outputs: names.
        takes_batches: whether the input has a batch axis.
        num_channels: C.
        trace_px: H, W of the image for tracing, if the file is to be for all sizes.
        check_px: sizes on which such a file is checked.
        compare: ``(reference, answer of the file, tolerance) -> differences``.
        metadata: plain values, see docs/export.md.
    """

    module: nn.Module
    native: nn.Module | None
    reference: Callable[[Tensor], Outputs]
    outputs: tuple[str, ...]
    takes_batches: bool
    num_channels: int
    trace_px: tuple[int, int]
    check_px: tuple[tuple[int, int], ...]
    compare: Compare
    metadata: Mapping[str, Any]


class Normalize(nn.Module):
    """``uint8 Tensor[B, H, W, C]`` -> ``float32 Tensor[B, C, H, W]`` of mean 0 and deviation 1.

    Args:
        mean, std: of the channels, in the unit of the pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, image: Tensor) -> Tensor:
        return ((image.float() - self.mean) / self.std).permute(0, 3, 1, 2)


def relative_difference(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference over the largest value; infinite if the shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(expected - found).max() / np.abs(expected).max())


def wrong_decisions(
    expected: np.ndarray, found: np.ndarray, margin: float, axis: int
) -> tuple[int, int]:
    """How many of the classes ``found`` are others than in ``expected``, and how many are decided.

    Args:
        expected: probabilities, with classes along ``axis``.
        found: classes, without that axis.
        margin: a class is decided if it is that much more probable than every other one.
    """
    second, first = np.moveaxis(np.partition(expected, -2, axis=axis), axis, 0)[-2:]
    decided = first - second > margin
    wrong = (expected.argmax(axis) != found) & decided
    return int(np.count_nonzero(wrong)), int(np.count_nonzero(decided))
