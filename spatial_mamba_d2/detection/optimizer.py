"""AdamW with the official weight decay rule, schedules, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, build_lr_scheduler
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from spatial_mamba_d2.models.param_groups import build_adamw
from spatial_mamba_d2.training.guard import clip_norm, gradient_norm

PLATEAU = "WarmupPlateauLR"  # of SOLVER.LR_SCHEDULER_NAME, in addition to Detectron2's


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """AdamW from ``cfg.SOLVER``; raises ValueError for a layer decay of another backbone."""
    return build_adamw(model, cfg.SOLVER, cfg.SOLVER.LAYER_DECAY)


def build_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Detectron2's schedules, and :data:`PLATEAU`: constant after the warmup.

    :class:`~.training_hooks.PlateauSchedule` lowers what the schedule starts from.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != PLATEAU:
        return build_lr_scheduler(cfg, optimizer)
    multiplier = WarmupParamScheduler(
        MultiStepParamScheduler([1.0], milestones=[], num_updates=solver.MAX_ITER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=multiplier, max_iter=solver.MAX_ITER)


def clip_gradients(cfg: CfgNode, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Clip gradients in place as ``cfg.SOLVER.CLIP_GRADIENTS`` says; does nothing if disabled.

    Returns:
        the norm of all of them together before clipping, a scalar.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [p for p in parameters if p.grad is not None]
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        return clip_norm(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)
    norm = gradient_norm(parameters)
    if clip.ENABLED and clip.CLIP_TYPE == "norm":
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)
    elif clip.ENABLED:
        nn.utils.clip_grad_value_(parameters, clip.CLIP_VALUE)
    return norm
