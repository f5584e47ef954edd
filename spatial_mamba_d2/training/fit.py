"""Training and evaluation on Lightning, as all tasks without Detectron2 do it."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from fvcore.common.config import CfgNode
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from spatial_mamba_d2.config import check_processes
from spatial_mamba_d2.data.class_file import compare_class_names
from spatial_mamba_d2.models import load_weights, read_checkpoint
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.cli import log_to_stdout, parse_address
from spatial_mamba_d2.training.checkpoint import BEST, LAST, SafeCheckpointIO, build_checkpointing
from spatial_mamba_d2.training.metrics_file import MetricsFile
from spatial_mamba_d2.training.module import TrainingModule

logger = logging.getLogger(__name__)

# Warnings of Lightning about what is taken care of here: the stream of batches resumes by itself,
# workers are a setting, OUTPUT_DIR is meant to be used again, and a moving average does not train.
_HANDLED = (
    ".*dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*in eval mode at the start of training.*",
)


def start(args: argparse.Namespace, load_config: Callable[..., CfgNode]) -> CfgNode:
    """The configuration, with logging started before it is read and generators seeded after.

    Raises:
        FileNotFoundError, ValueError: from ``load_config``.
    """
    log_to_stdout(logging.INFO if is_first_process() else logging.WARNING)
    cfg = load_config(args.config_file, args.opts)
    lightning.seed_everything(cfg.SEED, verbose=False)
    for message in _HANDLED:
        warnings.filterwarnings("ignore", message=message)
    return cfg


def is_first_process() -> bool:
    """Before there is a trainer to ask."""
    return getattr(rank_zero_only, "rank", 0) == 0


def build_trainer(cfg: CfgNode, args: argparse.Namespace, **kwargs: Any) -> lightning.Trainer:
    """A trainer on the devices that ``args`` asks for, or that ``torchrun`` has started it on.

    Raises:
        ValueError: more processes than GPUs, or no address of machine 0.
    """
    num_processes, num_machines = args.num_gpus, args.num_machines
    if "TORCHELASTIC_RUN_ID" in os.environ:
        num_processes = int(os.environ["LOCAL_WORLD_SIZE"])
        num_machines = int(os.environ["WORLD_SIZE"]) // num_processes
    elif num_machines > 1:
        host, port = parse_address(args.dist_url)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), NODE_RANK=str(args.machine_rank))
    device_type, _, gpu = cfg.MODEL.DEVICE.partition(":")
    on_gpu = device_type == "cuda"
    check_processes(cfg, num_processes)
    plugins: list[Any] = [SafeCheckpointIO()]
    if cfg.SOLVER.AMP.ENABLED:
        half = cfg.SOLVER.AMP.PRECISION == "float16"
        scaler = torch.amp.GradScaler(device_type) if half else None
        plugins.append(MixedPrecision("16-mixed" if half else "bf16-mixed", device_type, scaler))
    return lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=[int(gpu)] if gpu else num_processes,
        num_nodes=num_machines,
        strategy=DDPStrategy() if num_processes * num_machines > 1 else "auto",
        plugins=plugins,
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def fit(
    module: TrainingModule, data: lightning.LightningDataModule, args: argparse.Namespace
) -> dict[str, float]:
    """Train by ``module.schedule``, evaluate at the end, and return the scores.

    With ``args.resume`` training continues from ``OUTPUT_DIR/last.ckpt``, if that exists.

    Raises:
        FileNotFoundError, ValueError: data, weights or devices are not usable.
    """
    cfg, schedule, output = module.cfg, module.schedule, Path(module.cfg.OUTPUT_DIR)
    solver, iterations = cfg.SOLVER, schedule.iterations
    if is_first_process():
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / "config.yaml") as temporary:
            temporary.write_text(cfg.dump(), encoding="utf-8")
    last = output / LAST
    resuming = args.resume and last.is_file()
    if resuming:
        logger.info("resuming from %s", last)
    elif cfg.MODEL.WEIGHTS:
        skip = tuple(cfg.MODEL.WEIGHTS_SKIP)
        logger.info("%s", load_weights(module.model, cfg.MODEL.WEIGHTS, skip=skip))
    else:
        logger.warning("MODEL.WEIGHTS is empty: training starts from random weights")
    if not cfg.DATASETS.TEST:
        logger.info('DATASETS.TEST is "": no evaluation, and no %s', BEST)
    num_parameters = sum(p.numel() for p in module.model.parameters())
    logger.info("%s parameters, %s iterations", f"{num_parameters:,}", f"{iterations:,}")

    trainer = build_trainer(
        cfg,
        args,
        max_steps=iterations,
        accumulate_grad_batches=solver.ACCUMULATION_STEPS,
        gradient_clip_val=(
            solver.CLIP_GRADIENTS.CLIP_VALUE if solver.CLIP_GRADIENTS.ENABLED else None
        ),
        val_check_interval=(
            min(schedule.eval_period or iterations, iterations) * solver.ACCUMULATION_STEPS
        ),
        limit_val_batches=None if cfg.DATASETS.TEST else 0,
        log_every_n_steps=max(1, min(solver.LOG_PERIOD, iterations // 20)),
        logger=[
            MetricsFile(output / "metrics.json"),
            TensorBoardLogger(output, name="", version="tensorboard"),
        ],
        callbacks=[
            *build_checkpointing(output, schedule.checkpoint_period, module.main_score),
            TQDMProgressBar(refresh_rate=10),
        ],
    )
    trainer.fit(module, datamodule=data, ckpt_path=last if resuming else None)
    if iterations % schedule.checkpoint_period:
        trainer.save_checkpoint(last)
    if cfg.DATASETS.TEST and module.evaluated_step != iterations:
        trainer.validate(module, datamodule=data, verbose=False)
    return module.scores


def evaluate(
    module: TrainingModule, data: lightning.LightningDataModule, args: argparse.Namespace
) -> dict[str, float]:
    """Evaluate ``MODEL.WEIGHTS``, or else ``OUTPUT_DIR/best.ckpt``; return the scores.

    Raises:
        FileNotFoundError, ValueError: data, weights or devices are not usable.
    """
    cfg = module.cfg
    weights = Path(cfg.MODEL.WEIGHTS or Path(cfg.OUTPUT_DIR, BEST))
    if not cfg.MODEL.WEIGHTS and not weights.is_file():
        raise ValueError(f"no weights to evaluate: set MODEL.WEIGHTS ({weights} does not exist)")
    module.ema = None  # the file's weights are evaluated, averaged or not
    content = read_checkpoint(weights)
    load_weights(module.model, content, partial=False, source_name=str(weights))
    if difference := compare_class_names(
        content.get("classes", ()), module.class_names, str(weights)
    ):
        logger.warning("%s", difference)
    module.weights_source = str(weights)
    trainer = build_trainer(cfg, args, logger=False, enable_checkpointing=False)
    trainer.validate(module, datamodule=data, verbose=False)
    return module.scores
