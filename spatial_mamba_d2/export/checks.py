"""A file against PyTorch: images to compare on, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from spatial_mamba_d2.data.images import find_images, read_image
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.data.segmentation_transforms import resize_image
from spatial_mamba_d2.data.shapes import render_image
from spatial_mamba_d2.export.exportable import Difference, Exportable, Outputs, Tolerance
from spatial_mamba_d2.system.tables import console_table

_BATCHES = (1, 2, 5)
_NUM_GENERATED = 5
_GENERATED_PX = (128, 192)


class ExportError(ValueError):
    """A file's answers differ from PyTorch's by more than is accepted."""


def check_images(
    exportable: Exportable,
    size: tuple[int, int] | None,
    images: Iterable[Path] = (),
    value_range: PixelRange | None = None,
) -> Iterator[np.ndarray]:
    """Inputs to compare on: each image once, or more often until each size has had its turn.

    Args:
        size: H, W of the only size that the file takes; by default several, in batches of 1, 2 and
            5 images if the network takes batches.
        images: files and folders; by default, images are generated.
        value_range: of the images' values, see ``INPUT.PIXEL_RANGE``.

    Yields:
        ``uint8[H, W, C]``, or ``[B, H, W, C]``.
    """
    files = find_images(images) if (images := list(images)) else []
    number = len(files) or _NUM_GENERATED

    def image(index: int) -> np.ndarray:
        if files:
            return read_image(files[index % number], exportable.num_channels, value_range)
        pixels = render_image("val", index % number, image_px=_GENERATED_PX).image
        channels = np.resize(np.arange(3), exportable.num_channels)
        return np.ascontiguousarray(pixels[..., channels])

    sizes = [size] if size else list(exportable.check_px)
    index = turn = 0
    while index < number or turn < len(sizes):
        height, width = sizes[turn % len(sizes)]
        batch = _BATCHES[turn % len(_BATCHES)] if exportable.takes_batches and not size else 1
        pixels = [resize_image(image(index + i), (height, width)) for i in range(batch)]
        yield np.stack(pixels) if exportable.takes_batches else pixels[0]
        index, turn = index + batch, turn + 1


def compare(
    exportable: Exportable,
    run: Callable[[np.ndarray], Outputs],
    inputs: Iterable[np.ndarray],
    tolerance: Tolerance,
) -> str:
    """Compare the answers of ``run`` with PyTorch's; returns a table of the largest differences.

    Raises:
        ExportError: a difference is too large; names it, the image and the limit.
    """
    worst: dict[str, Difference] = {}
    shapes, num_answers = [], 0
    for pixels in inputs:
        expected = exportable.reference(torch.from_numpy(pixels))
        differences = exportable.compare(expected, run(pixels), tolerance)
        for difference in differences:
            if not difference.is_accepted:
                raise ExportError(
                    f"the file differs from PyTorch for an image of {list(pixels.shape)}: "
                    f"{difference}"
                )
            before = worst.get(difference.name, replace(difference, value=-1))
            worst[difference.name] = max(before, difference, key=lambda d: d.value)
        shapes.append("x".join(map(str, pixels.shape)))
        num_answers += _count(expected)
    if not shapes:
        raise ValueError("inputs must be at least one image, got none")
    rows = [(d.name, f"{d.value:.1e}", f"{d.limit:.0e}") for d in worst.values()]
    table = console_table(("largest difference", "", "at most"), rows)
    sizes = ", ".join(dict.fromkeys(shapes))
    return (
        f"compared with PyTorch on {len(shapes)} inputs ({sizes}), {num_answers} results\n{table}"
    )


def _count(outputs: Outputs) -> int:
    """How many results an answer has: detections, or images."""
    return len(next(iter(outputs.values())))


def check_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    """``size`` as H, W; raises ValueError unless both are above 0."""
    if size is None:
        return None
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be H W, both above 0, got {list(size)}")
    return size[0], size[1]
