"""Mean and standard deviation of the channels of images, for ``MODEL.PIXEL_MEAN`` and ``_STD``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.pixels import PixelRange

MAX_IMAGES = 500


def measure_pixels(
    files: Sequence[str | Path], num_channels: int = 3, value_range: PixelRange | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Over all pixels of the images, of which up to :data:`MAX_IMAGES` are read, evenly spaced.

    Args:
        files: at least one.
        num_channels, value_range: see :func:`~.images.read_image`.

    Returns:
        mean and standard deviation, ``float64[num_channels]``, of values from 0 to 255.

    Raises:
        FileNotFoundError, ValueError: an image cannot be read.
    """
    chosen = np.linspace(0, len(files) - 1, min(len(files), MAX_IMAGES)).round().astype(int)
    read = partial(_sums, num_channels=num_channels, value_range=value_range)
    with ThreadPoolExecutor() as pool:
        count, total, squares = np.sum(list(pool.map(read, [files[i] for i in chosen])), axis=0)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _sums(file: str | Path, num_channels: int, value_range: PixelRange | None) -> np.ndarray:
    """Number, sum and sum of squares of the values, ``float64[3, num_channels]``."""
    pixels = read_image(file, num_channels, value_range).reshape(-1, num_channels)
    values = np.arange(256.0)
    counts = np.stack([np.bincount(channel, minlength=256) for channel in pixels.T])
    return np.stack([counts.sum(axis=1), counts @ values, counts @ values**2])


def statistics_as_keys(
    files: Sequence[str | Path], num_channels: int = 3, value_range: PixelRange | None = None
) -> str:
    """What :func:`measure_pixels` finds, as words of a command line."""
    mean, std = (
        "({})".format(", ".join(f"{value:.2f}" for value in values))
        for values in measure_pixels(files, num_channels, value_range)
    )
    number = min(len(files), MAX_IMAGES)
    return f'pixels of {number} images: MODEL.PIXEL_MEAN "{mean}" MODEL.PIXEL_STD "{std}"'
