"""Command line, log and trainer of the tools that train on Lightning."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning
import torch
from fvcore.common.config import CfgNode
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from spatial_mamba_d2.models import load_weights
from spatial_mamba_d2.training.checkpoint import (
    BEST,
    LAST,
    SafeCheckpointIO,
    build_checkpointing,
    load_whole_model,
)
from spatial_mamba_d2.training.metrics_file import MetricsFile
from spatial_mamba_d2.training.module import TrainingModule

logger = logging.getLogger(__name__)

# What Lightning warns of and what is taken care of here: the stream of batches resumes by itself,
# workers are a setting, OUTPUT_DIR is meant to be used again, and a moving average does not train.
_HANDLED = (
    ".*dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*in eval mode at the start of training.*",
)


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all these tools have, in the habit of Detectron2's ``train_net.py``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE")
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="per machine; processes where there is no GPU"
    )
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    return parser


def start(args: argparse.Namespace, load_config: Callable[..., CfgNode]) -> CfgNode:
    """Log to standard output, load the configuration, seed the generators.

    Raises:
        FileNotFoundError, ValueError: from ``load_config``.
    """
    log_to_stdout()
    cfg = load_config(args.config_file, args.opts)
    lightning.seed_everything(cfg.SEED, verbose=False)
    for message in _HANDLED:
        warnings.filterwarnings("ignore", message=message)
    return cfg


def is_first_process() -> bool:
    """Before there is a trainer to ask."""
    return getattr(rank_zero_only, "rank", 0) == 0


def log_to_stdout() -> None:
    """The package's messages, of the first process; of the others only warnings."""
    package = logging.getLogger("spatial_mamba_d2")
    package.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    if not package.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
        package.addHandler(handler)


def build_trainer(cfg: CfgNode, args: argparse.Namespace, **kwargs: Any) -> lightning.Trainer:
    """A trainer on the devices that ``args`` asks for, or that ``torchrun`` has started it on.

    Raises:
        ValueError: more processes than GPUs, or no address of machine 0.
    """
    processes, machines = args.num_gpus, args.num_machines
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        machines = int(os.environ["WORLD_SIZE"]) // processes
    elif machines > 1:
        _set_address(args.dist_url, args.machine_rank)
    on_gpu = cfg.MODEL.DEVICE == "cuda"
    if on_gpu and processes > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus must be at most {torch.cuda.device_count()}, the GPUs here, "
            f"got {processes}"
        )
    plugins: list[Any] = [SafeCheckpointIO()]
    if cfg.SOLVER.AMP.ENABLED:
        half = cfg.SOLVER.AMP.PRECISION == "float16"
        scaler = torch.amp.GradScaler(cfg.MODEL.DEVICE) if half else None
        plugins.append(
            MixedPrecision("16-mixed" if half else "bf16-mixed", cfg.MODEL.DEVICE, scaler)
        )
    return lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=processes,
        num_nodes=machines,
        strategy=DDPStrategy() if processes * machines > 1 else "auto",
        plugins=plugins,
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def _set_address(url: str, machine_rank: int) -> None:
    parts = urlsplit(url)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise ValueError(f"--dist-url must be tcp://HOST:PORT for several machines, got {url!r}")
    os.environ.update(
        MASTER_ADDR=parts.hostname, MASTER_PORT=str(parts.port), NODE_RANK=str(machine_rank)
    )


def fit(
    module: TrainingModule,
    data: lightning.LightningDataModule,
    args: argparse.Namespace,
    *,
    iterations: int,
    eval_period: int,
    checkpoint_period: int,
    metric: str,
) -> dict[str, float]:
    """Train, evaluate at the end, and return the scores.

    With ``args.resume`` training goes on from ``OUTPUT_DIR/last.ckpt``, if it is there.

    Args:
        iterations: of the whole training.
        eval_period, checkpoint_period: iterations; evaluation 0: only at the end.
        metric: the score by which ``best.ckpt`` is chosen.

    Raises:
        FileNotFoundError, ValueError: data, weights or devices are not usable.
    """
    cfg, output = module.cfg, Path(module.cfg.OUTPUT_DIR)
    solver = cfg.SOLVER
    if is_first_process():
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
    last = output / LAST
    resuming = args.resume and last.is_file()
    if resuming:
        logger.info("resuming from %s", last)
    elif cfg.MODEL.WEIGHTS:
        skip = tuple(cfg.MODEL.WEIGHTS_SKIP)
        logger.info("%s", load_weights(module.model, cfg.MODEL.WEIGHTS, skip=skip))
    else:
        logger.warning("MODEL.WEIGHTS is empty: training starts from random weights")
    size = sum(p.numel() for p in module.model.parameters())
    logger.info("%s parameters, %s iterations", f"{size:,}", f"{iterations:,}")

    trainer = build_trainer(
        cfg,
        args,
        max_steps=iterations,
        accumulate_grad_batches=solver.ACCUMULATION_STEPS,
        gradient_clip_val=(
            solver.CLIP_GRADIENTS.CLIP_VALUE if solver.CLIP_GRADIENTS.ENABLED else None
        ),
        val_check_interval=min(eval_period or iterations, iterations) * solver.ACCUMULATION_STEPS,
        log_every_n_steps=max(1, min(solver.LOG_PERIOD, iterations // 20)),
        logger=[
            MetricsFile(output / "metrics.json"),
            TensorBoardLogger(output, name="", version="tensorboard"),
        ],
        callbacks=[
            *build_checkpointing(output, checkpoint_period, metric),
            TQDMProgressBar(refresh_rate=10),
        ],
    )
    trainer.fit(module, datamodule=data, ckpt_path=last if resuming else None)
    if iterations % checkpoint_period:
        trainer.save_checkpoint(last)
    if module.evaluated_step != iterations:
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
        raise ValueError(f"testing needs weights: give MODEL.WEIGHTS, for there is no {weights}")
    module.average = None  # the file's weights are evaluated, averaged or not
    load_whole_model(module.model, weights)
    module.weights_source = str(weights)
    trainer = build_trainer(cfg, args, logger=False, enable_checkpointing=False)
    trainer.validate(module, datamodule=data, verbose=False)
    return module.scores
