"""What ``tools/train_net.py`` runs in each process."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from spatial_mamba_d2.config import check_processes
from spatial_mamba_d2.data.coco import load_coco
from spatial_mamba_d2.data.pixel_statistics import statistics_as_keys
from spatial_mamba_d2.data.pixels import build_pixel_range
from spatial_mamba_d2.data.samplers import check_batch_size
from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.data import load_dataset, load_training_datasets
from spatial_mamba_d2.detection.limits import with_resolved_limit
from spatial_mamba_d2.detection.trainer import Trainer
from spatial_mamba_d2.models import load_weights, read_checkpoint
from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.training.guard import require_finite_weights
from spatial_mamba_d2.training.resuming import (
    count_trained,
    differing_keys,
    require_same_classes,
    require_same_network,
    require_training_state,
    tell_differences,
)
from spatial_mamba_d2.training.run_folder import LAST_MARK, claimed, log_end, tell_new_training

logger = logging.getLogger(__name__)


def read_config(args: argparse.Namespace) -> CfgNode:
    """Raises FileNotFoundError or ValueError: configuration or processes are not usable."""
    cfg = load_config(args.config_file, args.opts)
    check_processes(cfg, comm.get_local_size())
    if not args.eval_only:
        solver = cfg.SOLVER
        check_batch_size(solver.IMS_PER_BATCH, comm.get_world_size(), solver.ACCUMULATION_STEPS)
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration, loggers and seeds from Detectron2's command line.

    As Detectron2's ``default_setup``, but ``config.yaml`` is not written: an evaluation leaves the
    training's record alone, and a training writes it after its first iteration.

    Raises:
        FileNotFoundError, ValueError: configuration, number of processes, or data that a key is
            taken from are not usable.
    """
    cfg = read_config(args)
    start_logging(cfg, args)
    return with_resolved_limit(cfg, is_training=not args.eval_only)


def start_logging(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Detectron2's and our loggers, on standard output and in ``log.txt``; and the seeds."""
    rank, colored = comm.get_rank(), sys.stdout.isatty()
    for name in ("fvcore", "detectron2", "spatial_mamba_d2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, color=colored, name=name)
    log = logging.getLogger("detectron2")
    log.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    log.info("Environment info:\n%s", collect_env_info())
    log.info("Command line arguments: %s", args)
    log.info("Running with full config:\n%s", cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``--eval-only`` evaluate, and return the last evaluation's results.

    Raises:
        FileNotFoundError, ValueError: configuration, data, weights or OUTPUT_DIR are not usable.
        FloatingPointError: the training diverged, or weights to evaluate are not finite.
        OSError: OUTPUT_DIR cannot be written.
        Stopped: a signal ended the training, whose state is saved, or the evaluation.
    """
    with stopping.noticed():
        if args.eval_only:
            return evaluate(setup(args), resume=args.resume)
        cfg = read_config(args)
        first = comm.is_main_process()
        claim = claimed(cfg.OUTPUT_DIR, resume=args.resume, last=LAST_MARK, is_first_process=first)
        with claim:
            start_logging(cfg, args)
            with log_end("detectron2.engine.train_loop"):
                cfg = with_resolved_limit(cfg, is_training=True)
                return train(cfg, resume=args.resume)


def train(cfg: CfgNode, *, resume: bool) -> dict[str, Any] | None:
    """Train and return the last evaluation's results."""
    trainer = Trainer(cfg)
    checkpoint = trainer.last_checkpoint if resume else None
    if checkpoint is not None:
        accept(checkpoint, trainer)
    elif resume:
        tell_new_training(cfg.OUTPUT_DIR)
    trainer.resume_or_load(resume)
    if trainer.start_iter == trainer.max_iter:
        logger.info(
            "the training in %s is finished: %d iterations", cfg.OUTPUT_DIR, trainer.max_iter
        )
    trainer.train()
    return trainer.last_results


def accept(checkpoint: Path, trainer: Trainer) -> None:
    """Tell what differs from the run; ValueError if a checkpoint cannot be resumed so."""
    content = read_checkpoint(checkpoint)
    require_training_state(content, ("model", "trainer", "iteration"), checkpoint)
    if comm.is_main_process():
        trainer.checkpointer.read_best_score()  # needed only after the first evaluation
    require_finite_weights(content["model"], str(checkpoint))
    differences = differing_keys(trainer.cfg.OUTPUT_DIR, trainer.cfg)
    saved, ours = content["trainer"]["_trainer"]["optimizer"], trainer.optimizer.state_dict()
    require_same_network(
        content["model"],
        trainer.network,
        differences,
        checkpoint,
        num_trained=(count_trained(saved), count_trained(ours)),
    )
    require_same_classes(content.get("classes"), trainer.checkpointer.classes, checkpoint)
    tell_differences(differences, trainer.cfg.OUTPUT_DIR)


def evaluate(cfg: CfgNode, *, resume: bool) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint of ``OUTPUT_DIR``."""
    model = Trainer.build_model(cfg)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        weights = checkpointer.get_checkpoint_file()
    else:
        weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(
            "no weights to evaluate: set MODEL.WEIGHTS (or use --resume, with a checkpoint in "
            f"{cfg.OUTPUT_DIR})"
        )
    weights = checkpointer.path_manager.get_local_path(weights)
    content = read_checkpoint(weights)
    load_weights(model, content, partial=False, source_name=weights)
    classes = content.get("classes")  # ours have them, others do not
    results = Trainer.test(cfg, model, classes=classes)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_augmented(cfg, model, classes))
    if cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
        verify_results(cfg, results)
    return results


def check_data(config_file: str | Path | None, overrides: Sequence[str]) -> list[str]:
    """Check all that a training would read, and decode every image.

    Returns:
        a line for each data set, and one about the pixels of those that train.

    Raises:
        FileNotFoundError, ValueError: configuration or data are not usable.
    """
    cfg = load_config(config_file, overrides)
    training = load_training_datasets(cfg)
    classes = training[0].classes
    tests = [load_dataset(cfg, n, is_train=False, classes=classes) for n in cfg.DATASETS.TEST]
    for dataset in (*training, *tests):
        if dataset.json_file:
            load_coco(
                dataset.json_file,
                MetadataCatalog.get(dataset.name).image_root,
                on_error=cfg.DATASETS.ON_ERROR,
                check_decode=True,
                num_channels=cfg.INPUT.CHANNELS,
                value_range=build_pixel_range(cfg.INPUT.PIXEL_RANGE),
            )
    files = [record["file_name"] for dataset in training for record in dataset.records]
    return [
        *(f"{dataset.name}: {len(dataset.records)} images" for dataset in (*training, *tests)),
        statistics_as_keys(files, cfg.INPUT.CHANNELS, build_pixel_range(cfg.INPUT.PIXEL_RANGE)),
    ]
