"""The weight decay rule that the official detection and segmentation recipes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: no decay for parameters whose name contains ``norm``, decay for all others.

    The official rule (``paramwise_cfg`` of the authors' OpenMMLab configs), by official names;
    ours contain ``norm`` exactly where theirs do. The block's ``ln1``, ``ln2``, all biases,
    ``A_log`` and the batch norms ``bn`` of the heads therefore decay.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if "norm" not in name],
         "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if "norm" in name], "weight_decay": 0.0},
    ]  # fmt: skip


def build_adamw(model: nn.Module, solver: Any) -> torch.optim.AdamW:
    """AdamW with :func:`parameter_groups`, from a configuration's ``SOLVER``."""
    return torch.optim.AdamW(
        parameter_groups(model, solver.WEIGHT_DECAY),
        lr=solver.BASE_LR,
        betas=tuple(solver.BETAS),
    )
