"""What ``tools/train_net.py`` runs in each process."""

from __future__ import annotations

import argparse
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from spatial_mamba_d2.config import check_processes
from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.trainer import Trainer
from spatial_mamba_d2.models import load_weights


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration, loggers, seeds and output folder from Detectron2's command line.

    Raises:
        FileNotFoundError, ValueError: configuration or number of processes are not usable.
    """
    cfg = load_config(args.config_file, args.opts)
    check_processes(cfg, comm.get_local_size())
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="spatial_mamba_d2")
    return cfg


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``--eval-only`` evaluate, and return the last evaluation's results.

    Raises:
        FileNotFoundError, ValueError: configuration, data or weights are not usable.
    """
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(args.resume)
        trainer.train()
        return trainer.last_results
    model = Trainer.build_model(cfg)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR)
    if args.resume and checkpointer.has_checkpoint():
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
    return Trainer.test(cfg, model)
