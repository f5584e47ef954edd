"""Models as files for other runtimes: one call from weights to a file that was checked.

>>> from spatial_mamba_d2 import deploy
>>> deploy.export_model("spatialmamba_tiny.pth", "onnx", "classifier.onnx")

``tools/export_model.py`` is the command line, and docs/export.md describes the files.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import spatial_mamba_d2
from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.data.pixels import PixelRange, build_pixel_range
from spatial_mamba_d2.export import checks, formats
from spatial_mamba_d2.export.exportable import Exportable
from spatial_mamba_d2.export.precision import check_precision
from spatial_mamba_d2.models.checkpoints.reading import file_sha256
from spatial_mamba_d2.prediction.loading import recognise_model

logger = logging.getLogger(__name__)


def export_model(
    weights: str | Path,
    format: str,
    output: str | Path,
    *,
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    size: Sequence[int] | None = None,
    precision: str = "fp32",
    result: str | None = None,
    images: Iterable[Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``output``, a classifier, UPerNet or detector with its weights, and check it.

    The file appears only if its answers agree with PyTorch's. The task follows from the weights.

    Args:
        weights: a complete checkpoint, ours or the authors'.
        format: ``onnx``, ``openvino``, ``pt2`` or, unless it is a detector, ``aoti``.
        output: ends with ``.onnx``, ``.xml`` (and there will be a ``.bin`` next to it) or ``.pt2``.
        config_file, overrides: of the model; by default recognised, see
            :func:`~spatial_mamba_d2.prediction.loading.recognise_model`.
        size: H, W of the only image size that the file is for; by default, it is for all sizes.
        precision: ``fp32``; or ``fp16`` or ``int8``, see :mod:`.export.precision`.
        result: of UPerNet, ``labels`` (by default) or ``probabilities``.
        images: files and folders to check on; by default, images are generated.
        overwrite: replace ``output``.

    Returns:
        the metadata in the file.

    Raises:
        FileNotFoundError, ValueError: weights, configuration, images or another argument are
            unusable.
        ExportError: the file's answers differ from PyTorch's by more than is accepted.
        ImportError: a package is not installed.
    """
    output, size, images = Path(output), checks.check_size(size), list(images)
    versions = formats.require_packages(format)
    check_precision(format, precision)
    if output.suffix != (suffix := formats.SUFFIXES[format]):
        raise ValueError(f"output must end with {suffix} for {format}, got {output}")
    targets = [output, output.with_suffix(".bin")] if format == "openvino" else [output]
    check_outputs(targets, [Path(weights)], overwrite=overwrite)
    exportable, value_range = build_exportable(weights, config_file, overrides, result)
    metadata = describe(exportable, value_range, weights, size, versions)
    metadata["precision"] = precision
    program = formats.trace(exportable, size, native=format == "aoti")
    logger.info("traced: %d operations", len(program.graph.nodes))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.stem}-", dir=output.parent) as folder:
        path = Path(folder, output.name)
        text = json.dumps(metadata)
        files = formats.write(exportable, program, format, path, text, precision)
        run = formats.open_file(path, format)
        if run.metadata != metadata:
            raise RuntimeError(f"{path} does not hold its metadata")
        tolerance = formats.tolerance_of(precision)
        inputs = checks.check_images(exportable, size, images, value_range)
        logger.info("%s", checks.compare(exportable, run, inputs, tolerance))
        for file, target in zip(files, targets, strict=True):
            os.replace(file, target)
    sizes = ", ".join(f"{target} ({target.stat().st_size / 1e6:.1f} MB)" for target in targets)
    logger.info("written: %s", sizes)
    return metadata


def build_exportable(
    weights: str | Path,
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    result: str | None = None,
) -> tuple[Exportable, PixelRange | None]:
    """What :func:`export_model` exports, and the range of its images' values.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`export_model`.
    """
    task, cfg = recognise_model(weights, config_file or None, device="cpu", overrides=overrides)
    if result is not None and task != "segmentation":
        raise ValueError(f"result is for UPerNet only, got {result!r} for {task}")
    subpackage = importlib.import_module(f"spatial_mamba_d2.{task}.export")
    arguments = {} if result is None else {"output": result}
    return subpackage.build_exportable(cfg, **arguments), build_pixel_range(cfg.INPUT.PIXEL_RANGE)


def describe(
    exportable: Exportable,
    value_range: PixelRange | None,
    weights: str | Path,
    size: tuple[int, int] | None,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The metadata of a file, see docs/export.md.

    Raises:
        ValueError: there is no such file of this task for one ``size``.
    """
    return {
        **exportable.metadata,
        "resize": _describe_resize(exportable.metadata["resize"], size),
        "pixel_range": list(value_range or ()),
        "inputs": {formats.INPUT: _describe_input(exportable, size)},
        "outputs": list(exportable.outputs),
        "weights": {"file": Path(weights).name, "sha256": file_sha256(weights)},
        "versions": {
            "spatial_mamba_d2": spatial_mamba_d2.__version__,
            "torch": torch.__version__,
            **versions,
        },
    }


def _describe_resize(resize: dict[str, Any], size: tuple[int, int] | None) -> dict[str, Any]:
    """How images get the size that a file is for."""
    if size is None:
        return resize
    if "crop_px" not in resize:
        return {"filter": resize["filter"], "size_px": list(size)}
    if size[0] != size[1]:
        raise ValueError(f"size of a classifier must be square, got {list(size)}")
    short_px = round(resize["short_px"] * size[0] / resize["crop_px"])
    return {**resize, "short_px": short_px, "crop_px": size[0]}


def _describe_input(exportable: Exportable, size: tuple[int, int] | None) -> dict[str, Any]:
    height, width = size or ("H", "W")
    shape: list[Any] = [height, width, exportable.num_channels]
    if exportable.takes_batches:
        shape.insert(0, "B" if size is None else 1)
    return {"dtype": "uint8", "shape": shape}
