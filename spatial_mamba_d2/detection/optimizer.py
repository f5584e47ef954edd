"""AdamW with the weight decay rule of the official detection recipe, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: no decay for parameters whose name contains ``norm``, decay for all others.

    The official rule (``paramwise_cfg`` of the authors' mmdetection configs), by official names;
    ours contain ``norm`` exactly where theirs do. The block's ``ln1``, ``ln2``, all biases and
    ``A_log`` therefore decay.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if "norm" not in name],
         "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if "norm" in name], "weight_decay": 0.0},
    ]  # fmt: skip


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """AdamW from ``cfg.SOLVER``."""
    return torch.optim.AdamW(
        parameter_groups(model, cfg.SOLVER.WEIGHT_DECAY),
        lr=cfg.SOLVER.BASE_LR,
        betas=tuple(cfg.SOLVER.BETAS),
    )


def clip_gradients(cfg: CfgNode, parameters: Iterable[torch.Tensor]) -> None:
    """Clip gradients in place as ``cfg.SOLVER.CLIP_GRADIENTS`` says; nothing where not enabled."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return
    parameters = [p for p in parameters if p.grad is not None]
    if clip.CLIP_TYPE == "full_model":
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)
    elif clip.CLIP_TYPE == "norm":
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)
    else:
        nn.utils.clip_grad_value_(parameters, clip.CLIP_VALUE)
