"""How a label map is held in memory: the index of a class for each pixel, or that it is ignored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

IGNORE = 255  # in maps of at most so many classes; others: ignore_index
MAX_CLASSES = 65535


def index_dtype(num_classes: int) -> np.dtype:
    """``uint8`` for at most 255 classes, ``uint16`` for more."""
    return np.dtype(np.uint8 if num_classes <= IGNORE else np.uint16)


def ignore_index(num_classes: int) -> int:
    """What marks pixels that neither train nor count: 255, or 65535 with more than 255 classes."""
    return int(np.iinfo(index_dtype(num_classes)).max)


def ignored_in(label: np.ndarray) -> int:
    """What marks such pixels in a map of :func:`index_dtype`."""
    return int(np.iinfo(label.dtype).max)


def as_label_tensor(label: np.ndarray) -> Tensor:
    """``uint8`` -> the same, ``uint16`` -> ``int32``, because PyTorch can do little with that."""
    return torch.from_numpy(label if label.dtype == np.uint8 else label.astype(np.int32))


def as_label_array(label: Tensor, num_classes: int) -> np.ndarray:
    """The inverse, from any device."""
    return label.cpu().numpy().astype(index_dtype(num_classes), copy=False)
