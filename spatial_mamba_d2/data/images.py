"""Images named on a command line, and pictures written for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among ``paths``, and the images in the folders among them, sorted.

    Raises:
        FileNotFoundError: one does not exist, or there is no image at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"input: no such file or folder: {path}")
    if not files:
        raise FileNotFoundError(f"input: no image in {', '.join(map(str, paths))}")
    return files


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write RGB ``uint8[H, W, 3]`` or grey ``uint8[H, W]``; the folder is made where needed.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image):
        raise OSError(f"cannot write picture {path}")
