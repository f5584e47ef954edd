"""``load_predictor``: a file is enough, because task and configuration are recognised."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spatial_mamba_d2.config import flat_items
from spatial_mamba_d2.models.checkpoints.convert import backbone_arguments, find_variant
from spatial_mamba_d2.models.checkpoints.names import backbone_prefix, model_kind, translate
from spatial_mamba_d2.models.checkpoints.reading import (
    WeightsError,
    read_checkpoint,
    unwrap,
)
from spatial_mamba_d2.prediction.exported import is_exported, load_exported
from spatial_mamba_d2.prediction.optimizing import DTYPES, optimize_predictor
from spatial_mamba_d2.prediction.predictor import Predictor, Source
from spatial_mamba_d2.prediction.sources import find_sources
from spatial_mamba_d2.system.missing import no_such
from spatial_mamba_d2.system.package_files import recipe_file
from spatial_mamba_d2.system.yaml_file import parse_yaml

TASKS = ("detection", "segmentation", "classification")
_TASK_OF_KIND = {
    "detector": "detection", "segmentor": "segmentation", "classifier": "classification"
}  # fmt: skip
_CONFIG = "config.yaml"  # what a training leaves next to its checkpoints
_RECIPE_OF_VARIANT = {"tiny": "t", "small": "s", "base": "b"}


def load_predictor(
    weights: str | Path,
    config: str | Path | None = None,
    device: str | None = None,
    task: str | None = None,
    overrides: Sequence[str] = (),
    *,
    optimize: str | None = None,
    calibration: Source | None = None,
) -> Predictor:
    """A model that is ready to predict, from its checkpoint or an exported file.

    Args:
        weights: a checkpoint, see :func:`recognise_model`; or a file of ``tools/export_model.py``
            for onnxruntime (``.onnx``) or OpenVINO (``.xml``), which has its configuration inside.
        config: a YAML file of the task.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None: a GPU if there is one. Exported files run on
            the CPU.
        task: ``detection``, ``segmentation`` or ``classification``; None: recognised.
        overrides: ``KEY VALUE`` pairs, which count most.
        optimize: ``float32``, ``bfloat16`` or ``int8``: predict faster, with an optimised copy of
            the network, see :func:`.optimizing.optimize_predictor`. None: as it was trained.
        calibration: images for ``int8``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no complete model, its configuration does not fit or cannot be
            recognised, or an argument is unknown.
        ImportError: a package of the task, or the runtime of an exported file, is missing.
        RuntimeError: the processor cannot multiply in 8 bits.
    """
    if is_exported(weights):
        model = load_exported(weights)
        _check_exported(weights, model.task, config, device, task, overrides, optimize)
        return Predictor(model)
    task, cfg = recognise_model(weights, config, device=device, task=task, overrides=overrides)
    subpackage = importlib.import_module(f"spatial_mamba_d2.{task}.results")
    predictor = Predictor(subpackage.ImagePredictor(cfg))
    if optimize is not None or calibration is not None:
        optimize_predictor(predictor, optimize, calibration)
    return predictor


def _check_exported(
    weights: str | Path,
    found: str,
    config: str | Path | None,
    device: str | None,
    task: str | None,
    overrides: Sequence[str],
    optimize: str | None,
) -> None:
    given = ("config", config), ("overrides", list(overrides)), ("optimize", optimize)
    for name, value in given:
        if value:
            raise ValueError(
                f"{name} must be left out: {weights} is exported with its configuration inside, "
                f"for a runtime that optimises it, got {value}"
            )
    if device not in (None, "cpu"):
        raise ValueError(f"device must be cpu for the exported file {weights}, got {device!r}")
    if task not in (None, found):
        raise ValueError(f"task must be {found}, which {weights} is for, got {task!r}")


def recognise_model(
    weights: str | Path,
    config: str | Path | None = None,
    *,
    device: str | None = None,
    task: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[str, Any]:
    """Task and configuration of a checkpoint, with ``MODEL.WEIGHTS``.

    The configuration is ``config``; else what the checkpoint holds; else the ``config.yaml`` that
    the training left next to it; else the recipe of the published model that has these parameters,
    with the sizes that their shapes tell.

    Args:
        weights: a checkpoint of ours or of the authors: a complete classifier, segmentor or
            detector.
        config, device, task, overrides: see :func:`load_predictor`.

    Raises:
        FileNotFoundError, ValueError, ImportError: see :func:`load_predictor`.
    """
    if task not in (None, *TASKS):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    weights = Path(weights)
    content = read_checkpoint(weights)
    if task is None:
        task = recognise_task(content, str(weights))
    # By name, because the tasks stand above this subpackage, and need packages of their own.
    subpackage = importlib.import_module(f"spatial_mamba_d2.{task}.results")
    load_config = importlib.import_module(f"spatial_mamba_d2.{task}.config").load_config
    config_file, recorded = _configuration(weights, content, config, subpackage)
    pairs = [*recorded, *subpackage.WITHOUT_DATA, "MODEL.WEIGHTS", str(weights)]
    pairs += ["MODEL.DEVICE", device or "cuda"]  # which becomes the CPU if there is no GPU
    try:
        return task, load_config(config_file, [*pairs, *overrides])
    except ValueError as error:
        if config is not None or overrides:
            raise
        raise ValueError(f"weights: the configuration of {weights}: {error}") from error


def recognise_task(content: Mapping[str, Any], source: str) -> str:
    """``detection``, ``segmentation`` or ``classification``, by the names in a checkpoint.

    Raises:
        WeightsError: no complete model that we know.
    """
    state = unwrap(content, source)
    if any(".decode_head." in f".{name}" for name in state):
        return "segmentation"  # also around backbones of timm
    kind = model_kind(translate(state, source))
    if kind not in _TASK_OF_KIND:
        raise WeightsError(
            f"weights: {source} holds a {kind} without a head, which predicts nothing"
        )
    return _TASK_OF_KIND[kind]


def _configuration(
    weights: Path, content: Mapping[str, Any], config: str | Path | None, subpackage: Any
) -> tuple[Path | None, list[Any]]:
    """A file, and ``KEY VALUE`` pairs on top of it."""
    if config is not None:
        if not Path(config).is_file():
            raise no_such("config", config)
        return Path(config), []
    if isinstance(recorded := content.get("config"), str):
        pairs = flat_items(parse_yaml(recorded.encode(), f"{weights}: config"))
        return None, [word for pair in pairs for word in pair]
    if (beside := weights.with_name(_CONFIG)).is_file():
        return beside, []
    return _published(unwrap(content, str(weights)), str(weights), subpackage)


def _published(state: Mapping[str, Tensor], source: str, subpackage: Any) -> tuple[Path, list[Any]]:
    hint = "; pass its configuration as config (--config-file)"
    try:
        state = translate(state, source)
        prefix = backbone_prefix(state)
        backbone = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
        arguments = backbone_arguments(backbone, source)
    except WeightsError as error:
        raise WeightsError(f"{error}{hint}") from error
    variant = find_variant(arguments)
    if variant is None or arguments["in_chans"] != 3:
        raise WeightsError(
            f"weights: {source} is no published variant for RGB images "
            f"(width {arguments['embed_dim']}, {arguments['depths']} blocks, "
            f"{arguments['in_chans']} channels){hint}"
        )
    recipe = recipe_file(subpackage.RECIPE + _RECIPE_OF_VARIANT.get(variant, "t"))
    pairs = ["MODEL.SPATIAL_MAMBA.VARIANT", variant, *subpackage.sizes_of(state)]
    return recipe, pairs


def add_model_arguments(parser: ArgumentParser) -> None:
    """The options of command lines that pass them on to :func:`load_predictor`."""
    parser.add_argument("--weights", required=True, type=Path, metavar="FILE")
    parser.add_argument("--config-file", default="", metavar="FILE", help="default: recognised")
    parser.add_argument("--task", choices=TASKS, help="default: recognised")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--optimize", choices=DTYPES, help="predict faster; int8 needs --calibrate and VNNI"
    )
    parser.add_argument(
        "--calibrate", nargs="+", default=[], metavar="IMAGE", help="images, folders, ... for int8"
    )


def load_named_predictor(args: Namespace) -> Predictor:
    """The predictor that the options of :func:`add_model_arguments` name."""
    images = find_sources(args.calibrate, key="calibrate") if args.calibrate else None
    return load_predictor(
        args.weights, args.config_file or None, args.device, args.task, args.opts,
        optimize=args.optimize, calibration=images,
    )  # fmt: skip
