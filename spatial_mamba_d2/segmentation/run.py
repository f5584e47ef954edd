"""What ``tools/train_seg.py`` and ``tools/test_seg.py`` run in each process."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
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

from spatial_mamba_d2.data.ade20k import LabelFormat, SegmentationData, load_classes
from spatial_mamba_d2.data.segmentation_transforms import TestTransform, TrainTransform
from spatial_mamba_d2.models import load_weights
from spatial_mamba_d2.segmentation.checkpoint import (
    BEST,
    LAST,
    SafeCheckpointIO,
    build_checkpointing,
    load_segmentor_weights,
)
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.inference import build_protocol
from spatial_mamba_d2.segmentation.metrics_file import MetricsFile
from spatial_mamba_d2.segmentation.module import Segmentor

logger = logging.getLogger(__name__)

# What Lightning warns of and what is taken care of here: the stream of batches resumes by itself,
# workers are a setting, and OUTPUT_DIR is meant to be used again.
_HANDLED = (
    ".*dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
)


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that both tools have, in the habit of Detectron2's ``train_net.py``."""
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


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration, log and seed.

    Raises:
        FileNotFoundError, ValueError: see :func:`~.config.load_config`.
    """
    _log_to(sys.stdout)
    cfg = load_config(args.config_file, args.opts)
    lightning.seed_everything(cfg.SEED, verbose=False)
    for message in _HANDLED:
        warnings.filterwarnings("ignore", message=message)
    return cfg


def _is_first_process() -> bool:
    """Before there is a trainer to ask."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _log_to(stream: Any) -> None:
    """Our messages to ``stream``, of the first process; of the others only warnings."""
    package = logging.getLogger("spatial_mamba_d2")
    package.setLevel(logging.INFO if _is_first_process() else logging.WARNING)
    if not package.handlers:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
        package.addHandler(handler)


def build_data(cfg: CfgNode) -> SegmentationData:
    """The data module of ``cfg``; it reads nothing yet."""
    protocol = build_protocol(cfg)
    frame = {
        "short_px": cfg.INPUT.SHORT_PX,
        "long_px": cfg.INPUT.LONG_PX,
        "mean": tuple(cfg.MODEL.PIXEL_MEAN),
        "std": tuple(cfg.MODEL.PIXEL_STD),
    }
    return SegmentationData(
        cfg.DATASETS.ROOT,
        cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        LabelFormat(
            cfg.MODEL.NUM_CLASSES, cfg.DATASETS.LABEL_OFFSET, tuple(cfg.DATASETS.IGNORE_LABELS)
        ),
        TrainTransform(
            ratio_range=tuple(cfg.INPUT.RATIO_RANGE),
            crop_px=cfg.INPUT.CROP_PX,
            max_class_share=cfg.INPUT.MAX_CLASS_SHARE,
            flip=cfg.INPUT.FLIP,
            photometric=cfg.INPUT.PHOTOMETRIC,
            **frame,
        ),
        TestTransform(scales=protocol.scales, scales_of=protocol.scales_of, **frame),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        iterations=cfg.SOLVER.MAX_ITER,
        parts=cfg.SOLVER.ACCUMULATION_STEPS,
        seed=cfg.SEED,
        workers=cfg.DATALOADER.NUM_WORKERS,
        on_error=cfg.DATASETS.ON_ERROR,
    )


def build_segmentor(cfg: CfgNode) -> Segmentor:
    """The Lightning module of ``cfg``, with the class names of its data set."""
    classes = load_classes(cfg.DATASETS.CLASSES, cfg.DATASETS.ROOT, cfg.MODEL.NUM_CLASSES)
    return Segmentor(cfg, classes)


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


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train, evaluate at the end, and return the scores in percent.

    With ``args.resume`` training goes on from ``OUTPUT_DIR/last.ckpt``, if it is there.

    Raises:
        FileNotFoundError, ValueError: configuration, data or weights are not usable.
    """
    cfg = setup(args)
    solver, output = cfg.SOLVER, Path(cfg.OUTPUT_DIR)
    data, segmentor = build_data(cfg), build_segmentor(cfg)
    if _is_first_process():
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
    last = output / LAST
    resuming = args.resume and last.is_file()
    if resuming:
        logger.info("resuming from %s", last)
    elif cfg.MODEL.WEIGHTS:
        skip = tuple(cfg.MODEL.WEIGHTS_SKIP)
        logger.info("%s", load_weights(segmentor.model, cfg.MODEL.WEIGHTS, skip=skip))
    else:
        logger.warning("MODEL.WEIGHTS is empty: training starts from random weights")
    size = sum(p.numel() for p in segmentor.model.parameters())
    logger.info("%s parameters", f"{size:,}")

    period = min(cfg.TEST.EVAL_PERIOD or solver.MAX_ITER, solver.MAX_ITER)
    trainer = build_trainer(
        cfg,
        args,
        max_steps=solver.MAX_ITER,
        accumulate_grad_batches=solver.ACCUMULATION_STEPS,
        gradient_clip_val=(
            solver.CLIP_GRADIENTS.CLIP_VALUE if solver.CLIP_GRADIENTS.ENABLED else None
        ),
        val_check_interval=period * solver.ACCUMULATION_STEPS,
        log_every_n_steps=max(1, min(solver.LOG_PERIOD, solver.MAX_ITER // 20)),
        logger=[
            MetricsFile(output / "metrics.json"),
            TensorBoardLogger(output, name="", version="tensorboard"),
        ],
        callbacks=[
            *build_checkpointing(output, solver.CHECKPOINT_PERIOD),
            TQDMProgressBar(refresh_rate=10),
        ],
    )
    trainer.fit(segmentor, datamodule=data, ckpt_path=last if resuming else None)
    if solver.MAX_ITER % solver.CHECKPOINT_PERIOD:
        trainer.save_checkpoint(last)
    if segmentor.evaluated_step != solver.MAX_ITER:
        trainer.validate(segmentor, datamodule=data, verbose=False)
    return segmentor.scores


def test(args: argparse.Namespace) -> dict[str, float]:
    """Evaluate ``MODEL.WEIGHTS``, or else ``OUTPUT_DIR/best.ckpt``; return the scores in percent.

    Raises:
        FileNotFoundError, ValueError: configuration, data or weights are not usable.
    """
    cfg = setup(args)
    segmentor = build_segmentor(cfg)
    weights = Path(cfg.MODEL.WEIGHTS or Path(cfg.OUTPUT_DIR, BEST))
    if not cfg.MODEL.WEIGHTS and not weights.is_file():
        raise ValueError(f"testing needs weights: give MODEL.WEIGHTS, for there is no {weights}")
    load_segmentor_weights(segmentor.model, weights)
    segmentor.weights_source = str(weights)
    trainer = build_trainer(cfg, args, logger=False, enable_checkpointing=False)
    trainer.validate(segmentor, datamodule=build_data(cfg), verbose=False)
    return segmentor.scores
