"""Drawings of predicted classes: the image, and a line for each class under it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spatial_mamba_d2.data.drawing import blank_lines, enlarge, widen, write_text
from spatial_mamba_d2.prediction.results import ClassScores


def draw_classes(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """RGB ``uint8[H, W, 3]``, with ``lines`` of text under it -> RGB ``uint8[H', W', 3]``."""
    image = widen(enlarge(image))
    text = blank_lines(len(lines), image.shape[1])
    for number, line in enumerate(lines):
        write_text(text, line, x=6, line=number)
    return np.concatenate([image, text])


def draw_scores(image: np.ndarray, result: ClassScores) -> np.ndarray:
    """RGB ``uint8[H, W, 3]`` with its most probable classes -> RGB ``uint8[H', W', 3]``."""
    return draw_classes(image, [f"{name} {score:.1%}" for name, score in result.top()])
