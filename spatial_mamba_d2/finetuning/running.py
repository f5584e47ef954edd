"""``finetune``: read the data, choose settings, measure, write the configuration, train."""

from __future__ import annotations

import argparse
import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from spatial_mamba_d2.data.formats import read_data, split_data, write_training_files
from spatial_mamba_d2.finetuning import settings as choices
from spatial_mamba_d2.finetuning.data_facts import measure_data
from spatial_mamba_d2.finetuning.probing import OutOfMemoryError, probe
from spatial_mamba_d2.finetuning.rehearsal import load_any, require_rehearsal
from spatial_mamba_d2.finetuning.settings import Setting, Settings, Situation
from spatial_mamba_d2.models.checkpoints.convert import backbone_arguments, find_variant
from spatial_mamba_d2.models.checkpoints.names import backbone_prefix, model_kind, translate
from spatial_mamba_d2.models.checkpoints.reading import read_checkpoint, unwrap
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.package_files import recipe_file

logger = logging.getLogger(__name__)

CONFIG = "finetune.yaml"
_KIND_OF_TASK = {
    "detection": "detector", "segmentation": "segmentor", "classification": "classifier"
}  # fmt: skip
_EVALUATION_SHARE = 0.2  # of --minutes, at most
_RESERVE = 0.05  # of --minutes, because the first iterations are not the slowest ones


def finetune(
    data: str | Path,
    weights: str | Path | None = None,
    output: str | Path = "output/finetune",
    *,
    task: str | None = None,
    size: str | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    overrides: tuple[str, ...] = (),
    num_gpus: int = 1,
    resume: bool = False,
    only_write: bool = False,
    rehearse_first: bool = False,
) -> Path:
    """Train on a folder of labelled images, in any of the formats that are recognised.

    Args:
        data: see :func:`~spatial_mamba_d2.data.formats.read_data`.
        weights: a backbone, classifier, segmentor or detector, ours or the authors'; None: random
            weights.
        output: folder of the run.
        task: ``detection``, ``segmentation`` or ``classification``; None: the data's.
        size: ``t``, ``s`` or ``b``; None: that of the weights, or ``t``.
        epochs: length of the training; None: by the task, or by ``minutes``.
        minutes: that the training may take, by the measured time of an iteration.
        overrides: ``KEY VALUE ...``, which count most, and are written into the configuration.
        num_gpus: processes on this machine.
        resume: continue the training in ``output``; only ``output`` and ``overrides`` count then.
        only_write: write the configuration and do not train.
        rehearse_first: train only if a rehearsal passes.

    Returns:
        the configuration file.

    Raises:
        FileNotFoundError, ValueError: data, weights or an argument are not usable.
        FloatingPointError, OSError: from the training.
    """
    output = Path(output)
    config_file = output / CONFIG
    if resume:
        if not config_file.is_file():
            raise ValueError(f"--resume: there is no {config_file}, so no training to continue")
        task = _task_of(config_file)
    else:
        if config_file.exists():
            raise ValueError(
                f"output: {output} holds a training; continue it with --resume, or name another "
                "folder"
            )
        task = prepare(data, weights, output, task, size, epochs, minutes, overrides)
    if rehearse_first:
        require_rehearsal(task, config_file, overrides)
    if not only_write:
        train(task, config_file, overrides, num_gpus, resume)
    return config_file


def prepare(
    data_path: str | Path,
    weights: str | Path | None,
    output: Path,
    task: str | None,
    size: str | None,
    epochs: float | None,
    minutes: float | None,
    overrides: Sequence[str] = (),
) -> str:
    """Write the configuration, and return its task."""
    if epochs is not None and minutes is not None:
        raise ValueError("--epochs and --minutes exclude each other")
    for name, value in (("--epochs", epochs), ("--minutes", minutes)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
    data = split_data(read_data(data_path, task=task, extract_to=output / "data" / "images"))
    for note in (*data.notes, data.split_rule):
        if note:
            logger.info("%s", note)
    if data.findings:
        logger.warning(
            "%s: %d things were left out, the first: %s; tools/check_data.py shows all",
            data.path, len(data.findings), data.findings[0].message,
        )  # fmt: skip
    start, weights_size = inspect_weights(weights, data.task)
    if size and weights_size and size != weights_size:
        raise ValueError(f"--size {size} differs from that of the weights, {weights_size}")
    size = size or weights_size or "t"
    if size not in choices.SIZES:
        raise ValueError(f"--size must be one of {', '.join(choices.SIZES)}, got {size!r}")
    facts = measure_data(data)
    on_gpu = torch.cuda.is_available()
    batch = choices.default_batch(data.task, on_gpu, start, facts.num_images)
    situation = Situation(data.task, facts, start, on_gpu, batch, choices.LEAST_ITERATIONS)
    if situation.is_small and size != "t":
        situation = replace(situation, on_gpu=True)  # the recipe of that size, not the small one
    keys = write_training_files(data, output / "data")
    fixed = _fixed(keys, weights, start, data.task, output)
    config_file = output / CONFIG
    _write(config_file, situation, size, fixed, "a check of the command line")
    try:
        load_any(config_file, overrides, data.task)
    finally:
        config_file.unlink()
    fixed |= {
        key: Setting(CfgNode._decode_cfg_value(value), "from the command line")
        for key, value in zip(overrides[::2], overrides[1::2], strict=True)
    }
    situation = _fit(situation, size, fixed, config_file, epochs, minutes)
    _write(config_file, situation, size, fixed, f"tools/{_tool(data.task)}")
    logger.info("configuration: %s", config_file)
    return data.task


def _fixed(
    keys: Mapping[str, Any], weights: str | Path | None, start: str, task: str, output: Path
) -> Settings:
    """Settings that do not depend on a measurement."""
    fixed = {key: Setting(value) for key, value in keys.items()}
    fixed["MODEL.WEIGHTS"] = Setting(str(Path(weights).absolute()) if weights else "")
    if start == "model":
        fixed["MODEL.WEIGHTS_SKIP"] = Setting(
            choices.CLASS_LAYERS[task], "the data's classes are other ones"
        )
    fixed["OUTPUT_DIR"] = Setting(str(output.absolute()))
    return fixed


def _fit(
    situation: Situation,
    size: str,
    fixed: Settings,
    config_file: Path,
    epochs: float | None,
    minutes: float | None,
) -> Situation:
    """With a batch that fits into the memory, and the number of iterations."""
    measured = None
    if minutes is not None or situation.on_gpu:
        while measured is None:
            _write(config_file, situation, size, fixed, "a probe")
            try:
                measured = probe(situation.task, config_file, situation.batch)
            except OutOfMemoryError as error:
                smaller = situation.batch // 2
                if smaller < (2 if situation.task == "segmentation" else 1):
                    raise ValueError(
                        f"not even a batch of {situation.batch} fits: {error}"
                    ) from None
                logger.info("a batch of %d does not fit into the memory", situation.batch)
                situation = replace(situation, batch=smaller)
            finally:
                config_file.unlink(missing_ok=True)
    if minutes is not None and measured is not None:
        seconds = 60 * minutes * (1 - _RESERVE) - measured.overhead_s
        # A test image takes less than a training image: there is no backward pass.
        evaluation_s = situation.facts.num_val * measured.iteration_s / situation.batch
        number = int(_EVALUATION_SHARE * seconds / evaluation_s)
        number = min(max(1, number), choices.MOST_EVALUATIONS)
        situation = replace(situation, num_evaluations=number)
        iterations = int((seconds - number * evaluation_s) / measured.iteration_s)
        if iterations < choices.LEAST_ITERATIONS:
            raise ValueError(
                f"--minutes {minutes:g} is enough for {max(0, iterations)} iterations of "
                f"{measured.iteration_s:.1f} s, and {choices.LEAST_ITERATIONS} are needed"
            )
    else:
        epochs = epochs or choices.DEFAULT_EPOCHS[situation.task]
        iterations = max(choices.LEAST_ITERATIONS, round(epochs * situation.epoch_iterations))
    return replace(situation, iterations=iterations)


def _tool(task: str) -> str:
    return {"detection": "train_net.py", "segmentation": "train_seg.py",
            "classification": "train_cls.py"}[task]  # fmt: skip


def inspect_weights(weights: str | Path | None, task: str) -> tuple[str, str]:
    """``random``, ``backbone`` or ``model``, and the letter of the size, or "".

    Raises:
        FileNotFoundError, ValueError: it is no checkpoint that we know.
    """
    if not weights:
        return "random", ""
    state = translate(unwrap(read_checkpoint(weights), str(weights)), str(weights))
    prefix = backbone_prefix(state)
    backbone = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    variant = find_variant(backbone_arguments(backbone, str(weights)))
    letters = {name: letter for letter, name in choices.SIZES.items()}
    start = "model" if model_kind(state) == _KIND_OF_TASK[task] else "backbone"
    return start, letters.get(variant or "", "")


def _write(config_file: Path, situation: Situation, size: str, fixed: Settings, tool: str) -> None:
    """YAML on top of a recipe: each key with its reason."""
    recipe = recipe_file(choices.recipe_of(situation.task, size, situation.is_small))
    tree: dict[str, Any] = {}
    for key, setting in {**choices.choose(situation), **fixed}.items():
        node = tree
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = setting
    lines = [
        f"# python {tool} --config-file {config_file}",
        f"# {situation.task}, {situation.facts.num_images} training images, start: "
        f"{situation.start} weights; written by tools/finetune.py",
        f"_BASE_: {yaml.safe_dump(str(recipe)).splitlines()[0]}",
        *_yaml_lines(tree, 0),
    ]
    config_file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config_file) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _yaml_lines(tree: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    for name, value in tree.items():
        indent = "  " * depth
        if isinstance(value, Setting):
            comment = f"  # {value.reason}" if value.reason else ""
            lines.append(f"{indent}{name}: {_yaml_value(value.value)}{comment}")
        else:
            lines += [f"{indent}{name}:", *_yaml_lines(value, depth + 1)]
    return lines


def _yaml_value(value: Any) -> str:
    """As Detectron2's files have it: tuples as Python writes them."""
    if isinstance(value, tuple):
        return yaml.safe_dump(str(value), width=10_000).splitlines()[0]
    if isinstance(value, float):
        return repr(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.splitlines()[0]


def _task_of(config_file: Path) -> str:
    """The task in a file that :func:`_write` has written."""
    text = config_file.read_text(encoding="utf-8")
    task = next((t for t in choices.RECIPES if f"# {t}, " in text), None)
    if task is None:
        raise ValueError(f"{config_file}: was not written by tools/finetune.py")
    return task


def train(
    task: str, config_file: Path, overrides: tuple[str, ...], num_gpus: int, resume: bool
) -> None:
    """What the tool of the task does with the configuration."""
    args = argparse.Namespace(
        config_file=str(config_file), opts=list(overrides), resume=resume, eval_only=False,
        num_gpus=num_gpus, num_machines=1, machine_rank=0, dist_url="auto",
    )  # fmt: skip
    run = importlib.import_module(f"spatial_mamba_d2.{task}.train").run
    if task == "detection":
        launch = importlib.import_module("spatial_mamba_d2.detection.launch").launch
        launch(run, num_gpus, 1, 0, "auto", (args,))
    else:
        run(args)
