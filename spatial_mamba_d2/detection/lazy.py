"""Detectron2's Python configurations: ``LazyConfig``.

The files in ``configs/lazy`` are the recipes of ``configs`` as Python: networks, optimizers and
schedules are objects that can be replaced. Data are read and checked as in the YAML recipe of the
same name. They also run in Detectron2's own ``lazyconfig_train_net.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.engine import create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.layers import ShapeSpec
from detectron2.projects.point_rend import PointRendMaskHead
from detectron2.projects.point_rend.semantic_seg import PointRendSemSegHead
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from spatial_mamba_d2.detection import data as detection_data
from spatial_mamba_d2.detection import evaluators
from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.classes import num_classes_key
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.hooks import (
    NamedWriter,
    ProgressPrinter,
    StopOnSignal,
    StoppableLoader,
)
from spatial_mamba_d2.detection.mask_rle import with_rle_masks
from spatial_mamba_d2.detection.step import AccumulatingTrainer
from spatial_mamba_d2.detection.training_hooks import ThroughputLogger
from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.devices import check_device, check_device_name
from spatial_mamba_d2.system.missing import no_such
from spatial_mamba_d2.system.package_files import recipe_file
from spatial_mamba_d2.training.guard import IterationGuard, clip_norm
from spatial_mamba_d2.training.run_folder import CONFIG, LAST_MARK, METRICS, claimed, log_end

logger = logging.getLogger(__name__)


def load_lazy_config(name: str | Path, overrides: list[str] | None = None) -> DictConfig:
    """A Python configuration.

    Args:
        name: a file, or the name of a recipe in ``configs/lazy``, with or without ``.py``.
        overrides: ``key=value``, for keys that exist; ``+key=value`` adds one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an override is malformed, or its key does not exist.
    """
    path = Path(name)
    if not path.is_file() and path.parent in (Path(), Path("configs/lazy")):
        path = recipe_file(f"lazy/{path.stem}").with_suffix(".py")
    if not path.is_file():
        raise no_such("--config-file", name, hint="recipes are in configs/lazy")
    cfg = LazyConfig.load(str(path))
    words = []
    for word in overrides or []:
        key, sign, _ = word.partition("=")
        if not sign:
            raise ValueError(f"overrides must be key=value, got {word!r}")
        is_new, key = key.startswith("+"), key.removeprefix("+")
        if not is_new and not _has(cfg, key):
            raise ValueError(
                f"no such key in {path.name}: {key}; +{key}=... adds it (an argument that its "
                "default would have)"
            )
        words.append(word.removeprefix("+"))
    return LazyConfig.apply_overrides(cfg, words)


def _has(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if OmegaConf.is_list(node):
        return name.isdigit() and int(name) < len(node)
    return OmegaConf.is_dict(node) and name in node


def recipe_config(data: Mapping[str, Any], *words: object) -> CfgNode:
    """The YAML configuration by which data are read.

    Args:
        data: ``recipe``, the name of a YAML recipe, from which augmentation and all else is;
            ``train_json``, ``train_images``, ``test_json``, ``test_images``, and for Panoptic FPN
            ``train_sem_seg``, ``test_sem_seg``: as ``DATASETS.TRAIN_JSON`` and so on;
            ``num_classes``; ``overrides``, a list ``KEY, VALUE, ...`` of keys of that recipe.
        words: more of those.

    Raises:
        FileNotFoundError, ValueError: see :func:`~.config.load_config`.
    """
    recipe = recipe_file(data["recipe"])
    pairs = [
        str(word)
        for name in ("train_json", "train_images", "train_sem_seg", "test_json", "test_images",
                     "test_sem_seg")
        if data.get(name)
        for word in (f"DATASETS.{name.upper()}", data[name])
    ]  # fmt: skip
    pairs += [str(word) for word in (*data.get("overrides", ()), *words)]
    if data.get("num_classes") is not None:
        key = num_classes_key(load_config(recipe))
        pairs += [key, str(data["num_classes"])]
        if data["recipe"].startswith("point_rend"):
            pairs += ["MODEL.POINT_HEAD.NUM_CLASSES", str(data["num_classes"])]
    return load_config(recipe, pairs)


def build_train_loader(
    data: Mapping[str, Any], batch_size: int, num_workers: int = 4, seed: int = 0
) -> DataLoader:
    """Endless batches of the training set, in an order that follows from the seed.

    Args:
        data: see :func:`recipe_config`.
        batch_size: images of all processes.
        num_workers: processes that read images, of each process.
        seed: not negative.
    """
    cfg = recipe_config(data, "SOLVER.IMS_PER_BATCH", batch_size, "DATALOADER.NUM_WORKERS",
                        num_workers, "SEED", seed)  # fmt: skip
    return detection_data.build_train_loader(cfg, detection_data.load_training_datasets(cfg))


def _test_set(cfg: CfgNode) -> detection_data.DetectionDataset:
    """The first test set, with the classes of the training set if that is there."""
    if not cfg.DATASETS.TEST:
        raise ValueError("dataloader.data.test_json must name a file, got none")
    classes = None
    if cfg.DATASETS.TRAIN_JSON:
        classes = detection_data.load_training_datasets(cfg)[0].classes
    name = cfg.DATASETS.TEST[0]
    return detection_data.load_dataset(cfg, name, is_train=False, classes=classes)


def build_test_loader(data: Mapping[str, Any], num_workers: int = 4) -> Any:
    """The images of the test set, one at a time; see :func:`recipe_config`."""
    cfg = recipe_config(data, "DATALOADER.NUM_WORKERS", num_workers)
    return detection_data.build_test_loader(cfg, _test_set(cfg))


def build_evaluator(data: Mapping[str, Any], output_dir: str) -> DatasetEvaluators:
    """COCO's scores, and panoptic quality, of the test set; see :func:`recipe_config`."""
    cfg = recipe_config(data, "OUTPUT_DIR", output_dir)
    return evaluators.build_evaluator(cfg, _test_set(cfg))


def build_point_rend_head(num_classes: int, channels: int = 256) -> PointRendMaskHead:
    """PointRend's mask head, which Detectron2 builds from a YAML configuration only."""
    cfg = recipe_config(
        {"recipe": "point_rend_spatial_mamba_t", "num_classes": num_classes},
        "MODEL.FPN.OUT_CHANNELS", channels,
    )  # fmt: skip
    return PointRendMaskHead(cfg, _shapes(cfg.MODEL.ROI_HEADS.IN_FEATURES, channels))


def build_point_rend_semantic_head(num_classes: int, channels: int = 256) -> PointRendSemSegHead:
    """PointRend's head for stuff, likewise."""
    cfg = recipe_config(
        {"recipe": "panoptic_point_rend_spatial_mamba_t"},
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", num_classes, "MODEL.POINT_HEAD.NUM_CLASSES", num_classes,
        "MODEL.FPN.OUT_CHANNELS", channels,
    )  # fmt: skip
    return PointRendSemSegHead(cfg, _shapes(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES, channels))


def _shapes(names: Sequence[str], channels: int) -> dict[str, ShapeSpec]:
    """Of a pyramid's maps, from stride 4 on."""
    return {n: ShapeSpec(channels=channels, stride=4 * 2**i) for i, n in enumerate(names)}


def build_step_schedule(
    max_iter: int, steps: Sequence[int], warmup_iters: int, warmup_factor: float
) -> WarmupParamScheduler:
    """Factors of the learning rate: a tenth from each step on, after a linear warmup.

    Args:
        max_iter: iterations of the training; later steps are ignored.
        steps: iterations, ascending.
        warmup_iters: of the warmup.
        warmup_factor: that the warmup begins with.
    """
    steps = [step for step in steps if step < max_iter]
    values = [0.1**k for k in range(len(steps) + 1)]
    return WarmupParamScheduler(
        MultiStepParamScheduler(values, milestones=steps, num_updates=max_iter),
        warmup_factor,
        min(warmup_iters / max_iter, 1.0),
        "linear",
    )


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``--eval-only`` evaluate ``train.init_checkpoint``; the last results.

    Raises:
        FileNotFoundError, ValueError: configuration, data, weights or the folder are not usable.
        FloatingPointError: the training diverged.
        Stopped: a signal ended the training, or the evaluation.
    """
    cfg = load_lazy_config(args.config_file, args.opts)
    _resolve_device(cfg)
    with stopping.noticed():
        if args.eval_only:
            _start_logging(cfg, args)
            model = instantiate(cfg.model).to(cfg.train.device)
            checkpointer = SafeCheckpointer(model, cfg.train.output_dir)
            weights = cfg.train.init_checkpoint
            if args.resume and checkpointer.has_checkpoint():
                weights = checkpointer.get_checkpoint_file()
            if not weights:
                raise ValueError("train.init_checkpoint must name weights to evaluate, got none")
            checkpointer.load(weights)
            return evaluate(cfg, model)
        first = comm.is_main_process()
        folder = cfg.train.output_dir
        with claimed(folder, resume=args.resume, last=LAST_MARK, is_first_process=first):
            _start_logging(cfg, args)
            with log_end("detectron2.engine.train_loop"):
                return train(cfg, resume=args.resume)


def _resolve_device(cfg: DictConfig) -> None:
    """Without a GPU, ``train.device`` becomes ``cpu``."""
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        check_device_name(cfg.train.device, "train.device")
        cfg.train.device = "cpu"
    check_device(cfg.train.device, "train.device")


def _start_logging(cfg: DictConfig, args: argparse.Namespace) -> None:
    for name in ("fvcore", "detectron2", "spatial_mamba_d2"):
        setup_logger(
            cfg.train.output_dir,
            distributed_rank=comm.get_rank(),
            color=sys.stdout.isatty(),
            name=name,
        )
    logger.info("Environment info:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    seed_all_rng(cfg.train.seed + comm.get_rank())


def train(cfg: DictConfig, *, resume: bool) -> dict[str, Any] | None:
    """Train as ``cfg`` says; the results of the last evaluation."""
    settings = cfg.train
    model = instantiate(cfg.model).to(settings.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    for group in optimizer.param_groups:
        # Such as betas. Some versions of PyTorch keep them as they are, but an object of omegaconf
        # in a checkpoint is not read again.
        lists = {key: value for key, value in group.items() if isinstance(value, ListConfig)}
        group.update({key: tuple(value) for key, value in lists.items()})
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **settings.ddp)
    trainer = AccumulatingTrainer(
        model,
        loader,
        optimizer,
        device=settings.device,
        precision=torch.bfloat16 if settings.amp.enabled else None,
        seed=settings.seed,
        clip=partial(clip_norm, max_norm=settings.clip_norm),
    )
    checkpointer = SafeCheckpointer(model, settings.output_dir, trainer=trainer)
    trainer.checkpointer = checkpointer  # for StopOnSignal
    trainer.guard = IterationGuard(
        lambda: Path(checkpointer.get_checkpoint_file()) if checkpointer.has_checkpoint() else None,
        trainer.find_scale,
        torch.device(settings.device),
    )
    results: dict[str, Any] = {}

    def test() -> dict[str, Any]:
        results.update(evaluate(cfg, model))
        return results

    first = comm.is_main_process()
    period = settings.log_period
    trainer.register_hooks(
        [
            ThroughputLogger(cfg.dataloader.train.batch_size),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **settings.checkpointer) if first else None,
            hooks.EvalHook(settings.eval_period, test),
            hooks.PeriodicWriter(_build_writers(cfg), period) if first else None,
            StopOnSignal(),
        ]
    )
    checkpointer.resume_or_load(settings.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    loader.batch_sampler.start = start
    if first:
        _write_config(cfg)
    trainer.train(start, settings.max_iter)
    trainer.close_loader()
    return results


def _build_writers(cfg: DictConfig) -> list[Any]:
    folder = Path(cfg.train.output_dir)
    return [
        ProgressPrinter(cfg.train.max_iter),
        NamedWriter(JSONWriter(str(folder / METRICS), cfg.train.log_period), folder / METRICS),
        TensorboardXWriter(str(folder)),
    ]


def _write_config(cfg: DictConfig) -> None:
    """``config.yaml``, without the network, which the optimizer's arguments hold."""
    cfg = cfg.copy()
    cfg.optimizer.params.model = None
    path = Path(cfg.train.output_dir, CONFIG)
    with replacing(path) as temporary:
        LazyConfig.save(cfg, os.fspath(temporary))


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """The scores of the test set: ``{task: {metric: value}}``, in the first process."""
    loader = StoppableLoader(instantiate(cfg.dataloader.test))
    evaluator = instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(with_rle_masks(model), loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results or {}
