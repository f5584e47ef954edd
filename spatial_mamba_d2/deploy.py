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
from torch import Tensor

import spatial_mamba_d2
from spatial_mamba_d2 import model_zoo
from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.export import checks, formats
from spatial_mamba_d2.export.exportable import Exportable
from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.models.checkpoints.convert import (
    inspect_state,
    segmentor_arguments,
)
from spatial_mamba_d2.models.checkpoints.names import model_kind, translate
from spatial_mamba_d2.models.checkpoints.reading import file_sha256, unwrap

logger = logging.getLogger(__name__)

TASKS = {"classifier": "classification", "segmentor": "segmentation", "detector": "detection"}


def export_model(
    weights: str | Path,
    format: str,
    output: str | Path,
    *,
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    size: Sequence[int] | None = None,
    result: str | None = None,
    images: Iterable[Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``output``, a classifier, UPerNet or detector with its weights, and check it.

    The file appears only if its answers agree with PyTorch's. The task follows from the weights.

    Args:
        weights: a complete checkpoint, ours or the authors'.
        format: ``onnx``, ``openvino`` or ``pt2``.
        output: ends with ``.onnx``, ``.xml`` (and there will be a ``.bin`` next to it) or ``.pt2``.
        config_file, overrides: of the model; by default the published recipe of this variant, with
            the number of classes of the weights.
        size: H, W of the only image size that the file is for; by default, it is for all sizes.
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
    if output.suffix != (suffix := formats.SUFFIXES[format]):
        raise ValueError(f"output must end with {suffix} for {format}, got {output}")
    targets = [output, output.with_suffix(".bin")] if format == "openvino" else [output]
    check_outputs(targets, [Path(weights)], overwrite=overwrite)
    exportable, value_range = build_exportable(weights, config_file, overrides, result)
    metadata = {
        **exportable.metadata,
        "inputs": {formats.INPUT: _describe_input(exportable, size)},
        "outputs": list(exportable.outputs),
        "weights": {"file": Path(weights).name, "sha256": file_sha256(weights)},
        "versions": {
            "spatial_mamba_d2": spatial_mamba_d2.__version__,
            "torch": torch.__version__,
            **versions,
        },
    }
    program = formats.trace(exportable, size)
    logger.info("traced: %d operations", len(program.graph.nodes))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.stem}-", dir=output.parent) as folder:
        path = Path(folder, output.name)
        text = json.dumps(metadata)
        files = formats.write(exportable, program, format, path, text)
        if formats.read_metadata(path, format) != metadata:
            raise RuntimeError(f"{path} does not hold its metadata")
        run = formats.open_file(path, format)
        inputs = checks.check_images(exportable, size, images, value_range)
        logger.info("%s", checks.compare(exportable, run, inputs, formats.TOLERANCES[format]))
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
) -> tuple[Exportable, Any]:
    """What :func:`export_model` exports, and the range of its images' values.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`export_model`.
    """
    state = unwrap(read_checkpoint(weights), str(weights))
    task = _find_task(state, str(weights))
    if result is not None and task != "segmentation":
        raise ValueError(f"result is for UPerNet only, got {result!r} for {task}")
    words = [*overrides, "MODEL.WEIGHTS", str(weights), "MODEL.DEVICE", "cpu"]
    if config_file:
        cfg = importlib.import_module(f"spatial_mamba_d2.{task}.config").load_config(
            config_file, words
        )
    else:
        name, defaults = _recipe(task, translate(state, str(weights)), str(weights))
        logger.info("%s: %s, by the recipe %s", weights, task, name)
        cfg = model_zoo.get_config(name, [*defaults, *words])
    subpackage = importlib.import_module(f"spatial_mamba_d2.{task}.export")
    arguments = {} if result is None else {"output": result}
    return subpackage.build_exportable(cfg, **arguments), build_pixel_range(cfg.INPUT.PIXEL_RANGE)


def _find_task(state: Mapping[str, Tensor], source: str) -> str:
    kind = model_kind(state)
    if kind != "segmentor":  # which may have a backbone of timm
        kind = model_kind(translate(state, source))
    if kind not in TASKS:
        raise ValueError(
            f"weights: {source} must be of a classifier, a UPerNet or a detector, got a {kind}"
        )
    return TASKS[kind]


def _recipe(task: str, state: Mapping[str, Tensor], source: str) -> tuple[str, list[str]]:
    """The published recipe of a model with these weights, and what to change in it."""
    variant = inspect_state(state, source).variant
    entries = map(model_zoo.get_entry, model_zoo.list_models(task))
    names = [entry.name for entry in entries if entry.variant == variant]
    if not names:
        raise ValueError(
            f"weights: {source} is of no published variant; give the configuration of its training "
            "as --config-file"
        )
    if task == "detection":
        num_classes = len(state["roi_heads.box_predictor.cls_score.weight"]) - 1
        return names[0], ["MODEL.ROI_HEADS.NUM_CLASSES", str(num_classes)]
    if task == "classification":
        return names[0], ["MODEL.NUM_CLASSES", str(len(state["head.weight"]))]
    arguments = segmentor_arguments(state, source)
    keys = {
        "MODEL.NUM_CLASSES": "num_classes",
        "MODEL.UPERNET.CHANNELS": "channels",
        "MODEL.UPERNET.AUX_CHANNELS": "aux_channels",
    }
    return names[0], [word for key, arg in keys.items() for word in (key, str(arguments[arg]))]


def _describe_input(exportable: Exportable, size: tuple[int, int] | None) -> dict[str, Any]:
    height, width = size or ("H", "W")
    shape: list[Any] = [height, width, exportable.num_channels]
    if exportable.takes_batches:
        shape.insert(0, "B" if size is None else 1)
    return {"dtype": "uint8", "shape": shape}
