"""Classifiers by name, ours and timm's, with the maps of their stages; and images for them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from spatial_mamba_d2.data.images import find_images, read_image
from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.data.shapes import render_image
from spatial_mamba_d2.models import SpatialMambaClassifier, load_weights, read_checkpoint
from spatial_mamba_d2.models.checkpoints.reading import WeightsError, unwrap

logger = logging.getLogger(__name__)

FINEST_STRIDE = 4  # finer maps, of a convolutional stem, are not stages


def build_model(name: str, weights: Path | None = None, size_px: int = 224) -> Any:
    """The classifier ``name`` in eval mode; without a file its weights are random, with a warning.

    Args:
        name: ``spatial_mamba_tiny``, ``_small``, ``_base``, or another one of timm's.
        weights: a checkpoint of the complete classifier. Loading is strict, and runs no code from
            it.
        size_px: side of the images, which some models of timm need to know.

    Raises:
        ValueError: no such model, or it has no stages, or the weights do not fit.
        FileNotFoundError: no such file.
    """
    if not timm.is_model(name):
        raise ValueError(
            f"model must be spatial_mamba_tiny, spatial_mamba_small, spatial_mamba_base or another "
            f"of timm.list_models(), got {name!r}"
        )
    needs_size = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    options: dict[str, Any] = {"img_size": size_px} if needs_size else {}
    model = timm.create_model(name, **options)
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"model must have forward_intermediates (timm), {name!r} does not")
    if weights is None:
        logger.warning("%s has RANDOM weights: its figures show the architecture only", name)
    elif isinstance(model, SpatialMambaClassifier):
        logger.info("%s", load_weights(model, weights, partial=False))
    else:
        try:
            model.load_state_dict(unwrap(read_checkpoint(weights), str(weights)))
        except RuntimeError as error:
            raise WeightsError(f"weights: {weights} does not fit {name}: {error}") from None
    return model.eval()


def stage_maps(model: Any, x: Tensor) -> list[Tensor]:
    """``Tensor[B, 3, H, W]`` -> outputs of the stages, ``Tensor[B, C, H/4, W/4]`` and so on."""
    maps = model.forward_intermediates(x, intermediates_only=True)
    widest = math.ceil(x.shape[-1] / FINEST_STRIDE)
    return [stage for stage in maps if stage.shape[-1] <= widest]


def normalize(model: nn.Module, image: np.ndarray) -> Tensor:
    """RGB, ``uint8[H, W, 3]`` -> ``Tensor[3, H, W]`` as the model was trained on."""
    config = resolve_model_data_config(model)
    mean, std = (np.array(config[name], np.float32) for name in ("mean", "std"))
    pixels = (image.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def check_results(
    results: Iterable[Path],
    inputs: Sequence[Path],
    weights: Iterable[Path | None],
    *,
    overwrite: bool,
) -> None:
    """Raises ValueError if a result would be written over a file, see :func:`.check_outputs`."""
    files = find_images(inputs) if inputs else []
    check_outputs(results, [*files, *filter(None, weights)], overwrite=overwrite)


def read_square_images(paths: Iterable[Path], num_images: int, size_px: int) -> list[np.ndarray]:
    """The first ``num_images`` images among ``paths``; without paths, generated sample images.

    They are resized to a square, bicubic with antialiasing, as RepLKNet's script does.

    Returns:
        RGB, ``uint8[size_px, size_px, 3]`` each.

    Raises:
        FileNotFoundError: a path does not exist, or no image was found.
        ValueError: an image is broken, or ``num_images`` or ``size_px`` is out of range.
    """
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if size_px < 32:
        raise ValueError(f"size_px must be at least 32, got {size_px}")
    if paths := list(paths):
        images = [read_image(path) for path in find_images(paths)[:num_images]]
    else:
        logger.warning("no images are given: using generated sample images")
        images = [render_image("val", i).image for i in range(num_images)]
    size = (size_px, size_px)
    return [np.array(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images]
