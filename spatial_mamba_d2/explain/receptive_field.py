"""Effective receptive fields (Luo et al. 2016, arXiv 1701.04128) of the stages of backbones.

The protocol is that of RepLKNet's script (arXiv 2203.06717), which VMamba's figures follow too. The
score of a pixel is the gradient of the sum over channels of ``ReLU(map)`` at the central position
with respect to the normalised image; its negative part is dropped, and it is summed over colours
and averaged over images. Both rectifications are theirs. Without the inner one the sum would be
constant where a map ends in a layer norm.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spatial_mamba_d2.explain.backbones import (
    build_model,
    check_results,
    normalize,
    read_square_images,
    stage_maps,
)
from spatial_mamba_d2.system.devices import check_device
from spatial_mamba_d2.system.tables import console_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

SHARES = (0.2, 0.3, 0.5, 0.99)
DARKEST = 1e-4  # smallest visible score in figures, relative to the largest
PANEL_INCH, DPI = 3, 100


def receptive_fields(
    maps: Callable[[Tensor], Sequence[Tensor]], images: Iterable[Tensor]
) -> np.ndarray:
    """Contribution of each pixel to the centre of each of ``maps``, averaged over images.

    Args:
        maps: ``Tensor[1, 3, H, W]`` -> ``[Tensor[1, C, h, w], ...]``, a differentiable function,
            such as a model in eval mode. Parameters get no gradients.
        images: normalised, ``Tensor[3, H, W]`` each, of one size.

    Returns:
        scores, ``float64[S, H, W]`` for S maps.

    Raises:
        ValueError: no image is given, sizes differ, or a gradient is not finite.
    """
    total: np.ndarray | None = None
    num_images = 0
    for image in images:
        scores = np.stack([_score(gradient) for gradient in _central_gradients(maps, image)])
        if not np.isfinite(scores).all():
            raise ValueError(f"images must give finite gradients, image {num_images} does not")
        if total is not None and scores.shape != total.shape:
            sizes = [list(found.shape[1:]) for found in (total, scores)]
            raise ValueError(f"images must have one size, got {sizes[0]} and {sizes[1]}")
        total = scores if total is None else total + scores
        num_images += 1
    if total is None:
        raise ValueError("images must be at least one, got none")
    return total / num_images


def _central_gradients(maps: Callable[[Tensor], Sequence[Tensor]], image: Tensor) -> list[Tensor]:
    """For each map, the gradient ``Tensor[3, H, W]`` of its centre with respect to ``image``."""
    with torch.enable_grad():
        x = image[None].detach().requires_grad_()
        centres = [
            torch.relu(stage[..., stage.shape[-2] // 2, stage.shape[-1] // 2]).sum()
            for stage in maps(x)
        ]
        return [torch.autograd.grad(c, x, retain_graph=True)[0][0] for c in centres]


def _score(gradient: Tensor) -> np.ndarray:
    return gradient.relu().sum(0).double().cpu().numpy()


def smallest_square(scores: np.ndarray, share: float) -> tuple[int, float]:
    """The smallest square around the image's centre that holds more than ``share`` of all scores.

    Args:
        scores: not negative, ``float[H, W]``.

    Returns:
        its side in pixels, an odd number, and the share of the image's area that it covers. Parts
        outside of the image do not count as area.

    Raises:
        ValueError: ``share`` is not in [0, 1), or the scores are all zero.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    total = scores.sum()
    if not total > 0:
        raise ValueError(f"scores must have a positive sum, got {total}")
    height, width = scores.shape
    for reach in range(max(height, width)):
        square = scores[
            max(0, height // 2 - reach) : height // 2 + reach + 1,
            max(0, width // 2 - reach) : width // 2 + reach + 1,
        ]
        if square.sum() > share * total:
            break
    return 2 * reach + 1, square.size / scores.size


def field_sizes(scores: np.ndarray) -> dict[str, dict[str, Any]]:
    """:func:`smallest_square` for each of ``SHARES``, in two readings of ``scores[H, W]``.

    ``log`` takes ``log10(1 + score)``, as RepLKNet's tables do, which depends on the scale of the
    gradients; ``linear`` takes the scores themselves, which does not.
    """
    readings = {"log": np.log10(1 + scores), "linear": scores}
    sizes: dict[str, dict[str, Any]] = {name: {} for name in readings}
    for name, reading in readings.items():
        for share in SHARES:
            side_px, area = smallest_square(reading, share)
            sizes[name][f"{share:g}"] = {"side_px": side_px, "area": area}
    return sizes


def size_table(sizes: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """``{model: [field_sizes of each stage]}`` -> a table for a console."""
    header = ["model", "stage", *(f"t = {share:.0%}" for share in SHARES)]
    blocks = ["side of the smallest central square with t of all contributions, its share of area"]
    for reading, meaning in (("log", "log10(1 + score), as RepLKNet"), ("linear", "score")):
        rows = [
            [
                model,
                str(i),
                *(f"{s['side_px']} px {s['area']:.1%}" for s in stage[reading].values()),
            ]
            for model, stages in sizes.items()
            for i, stage in enumerate(stages, start=1)
        ]
        blocks.append(f"{meaning}\n{console_table(header, rows)}")
    return "\n\n".join(blocks)


def draw_fields(fields: Mapping[str, np.ndarray]) -> Figure:
    """One row for each title, one panel for each stage: ``{title: scores[S, H, W]}``.

    Colours are logarithmic over four decades, up to the largest score of the panel.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows, columns = len(fields), max(map(len, fields.values()))
    figure = Figure(
        figsize=(columns * PANEL_INCH, rows * PANEL_INCH), dpi=DPI, layout="constrained"
    )
    parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    for part, (title, stages) in zip(parts, fields.items(), strict=True):
        part.suptitle(title)
        panels = part.subplots(1, columns, squeeze=False)[0]
        for panel in panels:
            panel.set_axis_off()
        for number, (panel, scores) in enumerate(zip(panels, stages, strict=False), start=1):
            largest = scores.max()
            visible = np.clip(scores, DARKEST * largest, None)
            panel.imshow(visible, cmap="magma", norm=LogNorm(DARKEST * largest, largest))
            panel.set_title(f"stage {number}", fontsize="medium")
    return figure


def plot_receptive_fields(
    models: Sequence[str],
    weights: Sequence[Path | None],
    inputs: Sequence[Path],
    output: Path,
    *,
    num_images: int,
    size_px: int,
    seed: int,
    device: str,
    overwrite: bool = True,
) -> None:
    """Write ``erf.png``, ``erf.json`` and ``erf.npz`` (the scores) to ``output``.

    Args:
        models: see :func:`~.backbones.build_model`.
        weights: one for each model, ``None`` for random ones; if empty, all are random.
        inputs, num_images, size_px: see :func:`~.backbones.read_square_images`.
        seed: seed of random weights.
        overwrite: replace these files in ``output``; never an input.

    Raises:
        FileNotFoundError, ValueError: models, weights, images or the device are unusable.
    """
    weights = weights or [None] * len(models)
    if len(weights) != len(models):
        raise ValueError(
            f"weights must be one for each of {len(models)} models, got {len(weights)}"
        )
    if len(set(models)) != len(models):
        raise ValueError(f"models must be different ones, got {', '.join(models)}")
    check_device(device, "device")
    planned = [output / f"erf.{suffix}" for suffix in ("png", "json", "npz")]
    check_results(planned, inputs, weights, overwrite=overwrite)
    images = read_square_images(inputs, num_images, size_px)
    fields: dict[str, Any] = {}
    titles: dict[str, str] = {}
    for name, file in zip(models, weights, strict=True):
        torch.manual_seed(seed)
        model = build_model(name, file, size_px).to(device)
        tensors = (normalize(model, image).to(device) for image in images)
        fields[name] = receptive_fields(partial(stage_maps, model), tensors)
        titles[name] = f"{name}, {file.name if file else 'RANDOM WEIGHTS'}"
        logger.info("%s: %d images of %d px", titles[name], len(images), size_px)
    sizes = {name: [field_sizes(stage) for stage in field] for name, field in fields.items()}
    logger.info("%s", size_table(sizes))

    output.mkdir(parents=True, exist_ok=True)
    draw_fields({titles[name]: field for name, field in fields.items()}).savefig(output / "erf.png")
    np.savez_compressed(output / "erf.npz", **fields)
    content = {
        "images": [str(path) for path in inputs] or "generated",
        "number": len(images),
        "size_px": size_px,
        "seed": seed,
        "weights": {n: str(w) if w else "random" for n, w in zip(models, weights, strict=True)},
        "sizes": sizes,
    }
    (output / "erf.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    logger.info("erf.png, erf.json and erf.npz are in %s", output)
