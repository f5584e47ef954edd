"""What ``tools/train_net.py`` runs in each process."""

from __future__ import annotations

import argparse
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.datasets import resolve_datasets
from spatial_mamba_d2.detection.trainer import Trainer


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration, loggers, seeds and output folder from Detectron2's command line.

    Raises:
        FileNotFoundError, ValueError: see :func:`~.config.load_config`.
    """
    cfg = load_config(args.config_file, args.opts)
    cfg.defrost()
    resolve_datasets(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="spatial_mamba_d2")
    return cfg


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``--eval-only`` evaluate, and return the last evaluation's results."""
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
            f"--eval-only needs weights: give MODEL.WEIGHTS, or --resume with a checkpoint in "
            f"{cfg.OUTPUT_DIR}"
        )
    checkpointer.load(weights, checkpointables=[])
    return Trainer.test(cfg, model)
