"""Noise of generated sample images, the same on every machine."""

from __future__ import annotations

import cv2
import numpy as np


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell_px: int) -> np.ndarray:
    """Smooth noise with a grain of `cell_px`, float32 [H, W] from -1 to 1."""
    rows, columns = height // cell_px + 2, width // cell_px + 2
    grid = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    size = (columns * cell_px, rows * cell_px)
    smooth = cv2.resize(grid, size, interpolation=cv2.INTER_LINEAR_EXACT)
    offset = cell_px // 2  # beyond the border, where nothing is interpolated
    window = smooth[offset : offset + height, offset : offset + width]
    return window.astype(np.float32) / np.float32(127.5) - 1
