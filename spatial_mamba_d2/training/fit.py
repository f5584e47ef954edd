"""Training and evaluation on Lightning, as all tasks without Detectron2 do it."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from fvcore.common.config import CfgNode
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from spatial_mamba_d2.config import check_processes
from spatial_mamba_d2.data.class_file import compare_class_names
from spatial_mamba_d2.data.samplers import check_batch_size
from spatial_mamba_d2.models import load_weights, read_checkpoint
from spatial_mamba_d2.system import stopping
from spatial_mamba_d2.system.cli import log_to_stdout, parse_address
from spatial_mamba_d2.system.launching import (
    check_launch,
    slurm_tasks,
    under_torchrun,
    wait_for_machine_0,
)
from spatial_mamba_d2.training.checkpoint import Checkpoints, SafeCheckpointIO
from spatial_mamba_d2.training.guard import is_child_of_lightning, require_finite_weights
from spatial_mamba_d2.training.metrics_file import MetricsFile, NamedLogger
from spatial_mamba_d2.training.module import TrainingModule
from spatial_mamba_d2.training.progress import build_progress, logged_to
from spatial_mamba_d2.training.resuming import (
    count_trained,
    differing_keys,
    require_iterations_left,
    require_same_classes,
    require_same_network,
    require_training_state,
    tell_differences,
)
from spatial_mamba_d2.training.run_folder import (
    BEST,
    LAST,
    METRICS,
    claimed,
    log_end,
    patience_ends,
    read_scores,
    score_of_iteration,
    tell_new_training,
)

logger = logging.getLogger(__name__)

# Warnings of Lightning about what is taken care of here: the stream of batches resumes by itself,
# workers are a setting, OUTPUT_DIR is meant to be used again, and a moving average does not train.
_HANDLED = (
    ".*dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*in eval mode at the start of training.*",
    ".*`srun` command is available.*",
)


def start(args: argparse.Namespace, load_config: Callable[..., CfgNode]) -> CfgNode:
    """The configuration, with logging started before it is read and generators seeded after.

    Raises:
        FileNotFoundError, ValueError: from ``load_config``; the processes cannot be started so.
    """
    log_to_stdout(logging.INFO if is_first_process() else logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    check_launch(args)
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
        ConnectionError: machine 0 cannot be reached.
    """
    num_processes, num_machines = args.num_gpus, args.num_machines
    if under_torchrun():
        num_processes = int(os.environ["LOCAL_WORLD_SIZE"])
        num_machines = int(os.environ["WORLD_SIZE"]) // num_processes
    elif num_machines > 1:
        host, port = parse_address(args.dist_url)
        if args.machine_rank and not is_child_of_lightning():
            wait_for_machine_0(args.dist_url)
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), NODE_RANK=str(args.machine_rank))
    device_type, _, gpu = cfg.MODEL.DEVICE.partition(":")
    on_gpu = device_type == "cuda"
    check_processes(cfg, num_processes)
    if not args.eval_only:
        check_batch_size(
            cfg.SOLVER.IMS_PER_BATCH, num_processes * num_machines, cfg.SOLVER.ACCUMULATION_STEPS
        )
    plugins: list[Any] = [SafeCheckpointIO()]
    if not under_torchrun():
        # A job of SLURM has its variables also where srun has started no process for each device.
        # Its signals are handled by Checkpoints; a job that wants to be queued again says so to
        # sbatch (--requeue) and passes --resume.
        by_srun = slurm_tasks() > 1 and slurm_tasks() == num_processes * num_machines
        environment = SLURMEnvironment(auto_requeue=False) if by_srun else LightningEnvironment()
        plugins.append(environment)
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
        enable_progress_bar=sys.stdout.isatty(),  # ours is among the callbacks then
        num_sanity_val_steps=0,
        **kwargs,
    )


def fit(
    cfg: CfgNode,
    build: Callable[[], tuple[TrainingModule, lightning.LightningDataModule]],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Train by the module's schedule, evaluate at the end, and return the scores.

    With ``args.resume`` training continues from ``OUTPUT_DIR/last.ckpt``, if that exists.

    Args:
        build: called once OUTPUT_DIR is ours and signals are noticed; reading data may take long.

    Raises:
        FileNotFoundError, ValueError: data, weights, devices or OUTPUT_DIR are not usable.
        FloatingPointError: the training diverged.
        OSError: OUTPUT_DIR cannot be written.
        Stopped: a signal ended the training, whose state is saved.
    """
    folder = Path(cfg.OUTPUT_DIR)
    first = is_first_process() and not args.machine_rank
    claim = claimed(folder, resume=args.resume, last=LAST, is_first_process=first)
    with stopping.noticed(), claim:
        if not first:
            return _fit(*build(), args)
        with logged_to(folder), log_end("lightning.pytorch"):
            return _fit(*build(), args)


def _fit(
    module: TrainingModule, data: lightning.LightningDataModule, args: argparse.Namespace
) -> dict[str, float]:
    cfg, schedule, output = module.cfg, module.schedule, Path(module.cfg.OUTPUT_DIR)
    solver, iterations = cfg.SOLVER, schedule.iterations
    last = output / LAST
    done = 0
    if args.resume and last.is_file():
        done = _accept(last, module)
    else:
        if args.resume:
            tell_new_training(output)
        _load_initial_weights(cfg, module)
    if not cfg.DATASETS.TEST:
        logger.info('DATASETS.TEST is "": no evaluation, and no %s', BEST)
    num_parameters = sum(p.numel() for p in module.model.parameters())
    logger.info("%s parameters, %s iterations", f"{num_parameters:,}", f"{iterations:,}")

    period = max(1, min(solver.LOG_PERIOD, iterations // 20))
    patience, score = cfg.TEST.PATIENCE, module.main_score
    scores = {i: x for i, x in read_scores(output, score).items() if i < done}
    checkpoints = Checkpoints(output, schedule.checkpoint_period, patience, scores)
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
        log_every_n_steps=period,
        logger=[
            MetricsFile(output / METRICS),
            *(NamedLogger(name, cfg) for name in solver.LOGGERS),
        ],
        callbacks=[*build_progress(period), checkpoints],
    )
    with _children_end_with(trainer):
        evaluates = bool(cfg.DATASETS.TEST)
        ended = bool(patience_ends(scores, patience, score))
        if evaluates and done and _misses_evaluation(output, module, checkpoints, done, ended):
            trainer.validate(module, datamodule=data, ckpt_path=last, verbose=False)
            ended = bool(checkpoints.end)
        if done < iterations and not ended:
            trainer.fit(module, datamodule=data, ckpt_path=last if done else None)
            if evaluates and not checkpoints.end and module.evaluated_step != iterations:
                trainer.validate(module, datamodule=data, verbose=False)
    if checkpoints.end:
        logger.info("the training ends early: %s", checkpoints.end)
    return module.scores


def _load_initial_weights(cfg: CfgNode, module: TrainingModule) -> None:
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: training starts from random weights")
        return
    skip = tuple(cfg.MODEL.WEIGHTS_SKIP)
    content = read_checkpoint(cfg.MODEL.WEIGHTS)
    report = load_weights(module.model, content, skip=skip, source_name=cfg.MODEL.WEIGHTS)
    logger.info("%s", report)
    names = content.get("classes") if report.has_class_layers else None
    if difference := compare_class_names(
        names, module.class_names, cfg.MODEL.WEIGHTS, order_counts=False
    ):
        logger.warning("%s", difference)


def _accept(last: Path, module: TrainingModule) -> int:
    """The iterations that ``last.ckpt`` has behind it, if it can be resumed with these settings.

    Raises:
        ValueError: it cannot.
    """
    content = read_checkpoint(last)
    names = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "loops")
    require_training_state(content, names, last)
    cfg, done = module.cfg, int(content["global_step"])
    differences = differing_keys(last.parent, cfg)
    state = content.get("training_model", content["state_dict"])
    require_finite_weights(state, str(last))
    configured: Any = module.configure_optimizers()
    saved, ours = content["optimizer_states"][0], configured["optimizer"].state_dict()
    num_trained = count_trained(saved), count_trained(ours)
    require_same_network(state, module.model, differences, last, num_trained=num_trained)
    require_same_classes(content.get("classes"), module.class_names, last)
    key = "SOLVER.EPOCHS" if "EPOCHS" in cfg.SOLVER else "SOLVER.MAX_ITER"
    require_iterations_left(done, module.schedule.iterations, key, last)
    tell_differences(differences, last.parent)
    if done == module.schedule.iterations:
        logger.info("the training in %s is finished: %d iterations", last.parent, done)
    else:
        logger.info("resuming from %s, after iteration %d", last, done)
    return done


def _misses_evaluation(
    output: Path, module: TrainingModule, checkpoints: Checkpoints, done: int, ended: bool
) -> bool:
    """Whether ``last.ckpt``, written before an evaluation, is still to be evaluated.

    A finished training, also one that ended early, is evaluated again: its scores are what a tool
    returns.
    """
    if ended or done == module.schedule.iterations:
        return True
    if not module.schedule.evaluates_after(done):
        return False
    score = score_of_iteration(output, done, module.main_score)
    if score is not None and is_first_process():
        checkpoints.keep_if_best(score)
    return score is None


@contextmanager
def _children_end_with(trainer: lightning.Trainer) -> Iterator[None]:
    """Processes that this one has started would wait for it forever."""
    try:
        yield
    except BaseException as error:
        kill = getattr(trainer.strategy.launcher, "kill", None)
        if kill is not None and not is_child_of_lightning():
            kill(getattr(signal, "SIGKILL", signal.SIGTERM))
        agreed = isinstance(error, stopping.Stopped | FloatingPointError)
        if agreed and is_child_of_lightning():
            raise SystemExit(0) from None  # the first process says it, with the exit code
        raise


def evaluate(
    module: TrainingModule, data: lightning.LightningDataModule, args: argparse.Namespace
) -> dict[str, float]:
    """Evaluate ``MODEL.WEIGHTS``, or else ``OUTPUT_DIR/best.ckpt``; return the scores.

    Raises:
        FileNotFoundError, ValueError: data, weights or devices are not usable.
        Stopped: a signal ended the evaluation.
    """
    cfg = module.cfg
    weights = Path(cfg.MODEL.WEIGHTS or Path(cfg.OUTPUT_DIR, BEST))
    if not cfg.MODEL.WEIGHTS and not weights.is_file():
        raise ValueError(f"no weights to evaluate: set MODEL.WEIGHTS ({weights} does not exist)")
    module.ema = None  # the file's weights are evaluated, averaged or not
    content = read_checkpoint(weights)
    load_weights(module.model, content, partial=False, source_name=str(weights))
    if difference := compare_class_names(content.get("classes"), module.class_names, str(weights)):
        logger.warning("%s", difference)
    module.weights_source = str(weights)
    period = max(1, cfg.SOLVER.LOG_PERIOD)
    trainer = build_trainer(
        cfg, args, logger=False, enable_checkpointing=False, callbacks=build_progress(period)
    )
    log = logged_to(cfg.OUTPUT_DIR) if trainer.is_global_zero else nullcontext()
    with stopping.noticed(), log, _children_end_with(trainer):
        trainer.validate(module, datamodule=data, verbose=False)
    return module.scores
