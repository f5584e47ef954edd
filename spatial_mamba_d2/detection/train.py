"""What ``tools/train_net.py`` runs in each process."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from spatial_mamba_d2.config import check_processes
from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.trainer import Trainer
from spatial_mamba_d2.models import load_weights, read_checkpoint
from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.training.guard import require_finite_weights
from spatial_mamba_d2.training.resuming import (
    count_trained,
    differing_keys,
    require_same_network,
    tell_differences,
)
from spatial_mamba_d2.training.run_folder import claimed, log_end

logger = logging.getLogger(__name__)


def read_config(args: argparse.Namespace) -> CfgNode:
    """Raises FileNotFoundError or ValueError: configuration or processes are not usable."""
    cfg = load_config(args.config_file, args.opts)
    check_processes(cfg, comm.get_local_size())
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration, loggers and seeds from Detectron2's command line.

    As Detectron2's ``default_setup``, but ``config.yaml`` is not written: an evaluation leaves the
    training's record alone, and a training writes it after its first iteration.

    Raises:
        FileNotFoundError, ValueError: configuration or number of processes are not usable.
    """
    cfg = read_config(args)
    start_logging(cfg, args)
    return cfg


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
        with claimed(cfg.OUTPUT_DIR, resume=args.resume, is_first_process=first):
            start_logging(cfg, args)
            with log_end("detectron2.engine.train_loop"):
                return train(cfg, resume=args.resume)


def train(cfg: CfgNode, *, resume: bool) -> dict[str, Any] | None:
    """Train and return the last evaluation's results."""
    trainer = Trainer(cfg)
    checkpoint = trainer.last_checkpoint if resume else None
    if checkpoint is not None:
        accept(checkpoint, trainer)
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
    classes = trainer.checkpointer.classes or []
    if content.get("classes") and list(content["classes"]) != classes:
        raise ValueError(
            f"--resume: {checkpoint} was trained for the classes {', '.join(content['classes'])}, "
            f"the data now has {', '.join(classes)}; nothing was changed"
        )
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
    load_weights(model, weights, partial=False)
    require_finite_weights(model.state_dict(), str(weights))
    return Trainer.test(cfg, model)
