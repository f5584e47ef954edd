"""AdamW with the official weight decay rule, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from torch import nn

from spatial_mamba_d2.models.param_groups import build_adamw


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """AdamW from ``cfg.SOLVER``."""
    return build_adamw(model, cfg.SOLVER)


def clip_gradients(cfg: CfgNode, parameters: Iterable[torch.Tensor]) -> None:
    """Clip gradients in place as ``cfg.SOLVER.CLIP_GRADIENTS`` says; does nothing if disabled."""
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
