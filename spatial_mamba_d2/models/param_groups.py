"""Weight decay as the official detection and segmentation recipes have it, and layer decay."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from spatial_mamba_d2.models.spatial_mamba import SpatialMamba
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


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factors of the learning rate by the names of a model's parameters: lower in early layers.

    As in ViTDet (Li et al., 2022): the last block of our backbone has ``layer_decay``, each block
    before it that factor once more, the stem one more than the first block; all else has 1. What
    leads from one stage to the next belongs to the block after it.

    Args:
        model: with one of our backbones in it.
        layer_decay: above 0, at most 1.

    Raises:
        ValueError: ``layer_decay`` is out of its range, or the model has none of our backbones.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    found = [(place, m) for place, m in model.named_modules() if isinstance(m, SpatialMamba)]
    if not found:
        raise ValueError("layer_decay must be 1 for a model without a Spatial-Mamba backbone")
    place, backbone = found[0]
    first_block = [1]  # of each stage; the stem is layer 0
    for stage in backbone.stages:
        num_blocks = len(list(stage.get_submodule("blocks").children()))
        first_block.append(first_block[-1] + num_blocks)
    pattern = re.compile(
        rf"{re.escape(place)}\.?(?:(stem)|stages\.(\d+)\.(?:blocks\.(\d+)|(downsample)))\."
    )

    def layer(name: str) -> int:
        match = pattern.match(name)
        if match is None:
            return first_block[-1]
        stem, stage, block, downsample = match.groups()
        if stem:
            return 0
        return first_block[int(stage) + 1] if downsample else first_block[int(stage)] + int(block)

    return {
        name: layer_decay ** (first_block[-1] - layer(name)) for name, _ in model.named_parameters()
    }


def layered_groups(
    model: nn.Module, base_lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The groups of :func:`parameter_groups`, with learning rates, for any optimizer of PyTorch.

    Args:
        base_lr: of the parameters that are not scaled.
        weight_decay: of the parameters that decay.
        layer_decay: below 1, the learning rates are scaled by :func:`layer_scales`.

    Raises:
        ValueError: see :func:`layer_scales`.
    """
    groups = [{**group, "lr": base_lr} for group in parameter_groups(model, weight_decay)]
    if layer_decay == 1:
        return groups
    scales = layer_scales(model, layer_decay)
    return _split(groups, {p: scales[name] for name, p in model.named_parameters()}, base_lr)


def build_adamw(model: nn.Module, solver: Any, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """AdamW with :func:`parameter_groups`, from a configuration's ``SOLVER``.

    Args:
        layer_decay: see :func:`layered_groups`.

    Raises:
        ValueError: see :func:`layered_groups`.
    """
    groups = layered_groups(model, solver.BASE_LR, solver.WEIGHT_DECAY, layer_decay)
    return adamw(groups, solver.BASE_LR, solver)


def adamw(groups: list[dict[str, Any]], lr: float, solver: Any) -> torch.optim.AdamW:
    """AdamW with ``SOLVER.BETAS``, as one kernel where that exists.

    Not with float16, because such an optimizer takes its scaled gradients and undoes the scale
    itself, after they have been clipped and looked at.

    Args:
        groups: of parameters.
        lr: of groups without one.
    """
    devices = {p.device.type for group in groups for p in group["params"]}
    is_scaled = solver.AMP.ENABLED and solver.AMP.PRECISION == "float16"
    fused = devices <= {"cpu", "cuda"} and not is_scaled
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(solver.BETAS), fused=fused or None)


def _split(
    groups: list[dict[str, Any]], scales: dict[nn.Parameter, float], base_lr: float
) -> list[dict[str, Any]]:
    """Each group once for each learning rate in it; the highest rate comes first."""
    return [
        {**group, "params": chosen, "lr": base_lr * scale}
        for scale in sorted(set(scales.values()), reverse=True)
        for group in groups
        if (chosen := [p for p in group["params"] if scales[p] == scale])
    ]
