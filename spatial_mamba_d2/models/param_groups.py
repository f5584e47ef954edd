"""The weight decay rule that the official detection and segmentation recipes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spatial_mamba_d2.models.timm_backbone import TimmBackbone


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: no decay for parameters whose name contains ``norm``, decay for all others.

    The official rule (``paramwise_cfg`` of the authors' OpenMMLab configs), by official names;
    ours contain ``norm`` exactly where theirs do. The block's ``ln1``, ``ln2``, all biases,
    ``A_log`` and the batch norms ``bn`` of the heads therefore decay. A backbone of timm also
    exempts what it says itself, such as Swin's position biases.
    """
    exempt = {
        f"{place}.{name}".lstrip(".")  # the model may be the backbone itself
        for place, module in model.named_modules()
        if isinstance(module, TimmBackbone)
        for name in module.no_weight_decay()
    }
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if "norm" in name or name in exempt else decaying).append(parameter)
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def build_adamw(model: nn.Module, solver: Any) -> torch.optim.AdamW:
    """AdamW with :func:`parameter_groups`, from a configuration's ``SOLVER``."""
    return torch.optim.AdamW(
        parameter_groups(model, solver.WEIGHT_DECAY),
        lr=solver.BASE_LR,
        betas=tuple(solver.BETAS),
    )
