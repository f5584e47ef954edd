"""How large the published models are: parameters, FLOPs in two ways of counting, memory.

The authors' way of counting is described in :mod:`.flops`. The complete count takes in everything
that a model computes in eval mode: each multiply-add of a convolution, matrix product, scan and
fusion is 1, and so is each other arithmetic operation or activation per element.

Only shapes are computed, so any machine can do it in seconds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spatial_mamba_d2 import model_zoo
from spatial_mamba_d2.profiling.counting import FREE_OPERATORS, count_operators
from spatial_mamba_d2.profiling.detector_layers import forward_all_layers
from spatial_mamba_d2.profiling.memory import saved_bytes_by_module

# Pattern at the beginning of a module's name -> part of the model; the first match counts.
_PARTS = (
    (r".*\bstem\b", "stem"),
    *((rf".*\bstages\.{i}\b", f"stage {i + 1}") for i in range(4)),
    (r".*\boutput_norms\b", "output norms"),
    (r"backbone\b", "feature pyramid"),
    (r"proposal_generator\b", "proposal head"),
    (r"roi_heads\.box_", "box head"),
    (r"roi_heads\.mask_", "mask head"),
    (r"roi_heads\.keypoint_", "keypoint head"),
    (r"sem_seg_head\b", "semantic head"),
    (r"head\.(cls|bbox)_", "dense head"),
    (r"decode_head\b", "decode head"),
    (r"auxiliary_head\b", "auxiliary head"),
    (r"", "classifier head"),
)


def part_of(name: str) -> str:
    """The part of the model to which a module or parameter of this name belongs."""
    return next(part for pattern, part in _PARTS if re.match(pattern, name))


@dataclass
class Size:
    """Figures of a part of a model, of an operator, or of the complete model.

    Attributes:
        parameters: how many there are; None for an operator.
        calls: how often operators are called.
        official_gflops, complete_gflops: see :data:`.model_report.CONVENTIONS`.
        saved_mib: activations kept for backward, for each image; None for an operator.
    """

    parameters: int | None = None
    calls: int = 0
    official_gflops: float = 0.0
    complete_gflops: float = 0.0
    saved_mib: float | None = None


@dataclass
class Analysis:
    """What :func:`analyze` found, next to what was published.

    Attributes:
        name: see :func:`~.model_zoo.get_recipe`.
        input_shape: ``[B, 3, H, W]`` for the FLOPs and the peak.
        published_parameters_m, published_gflops: None if nothing was published.
        total: figures of the complete model.
        peak_mib: most memory of activations in a forward pass without gradients.
        parts, operators: figures by name.
    """

    name: str
    input_shape: tuple[int, ...]
    published_parameters_m: int | None
    published_gflops: float | None
    total: Size
    peak_mib: float
    parts: dict[str, Size]
    operators: dict[str, Size]


def analyze(name: str, input_px: tuple[int, int] | None = None) -> Analysis:
    """Count a published model, or one of another recipe.

    Args:
        name: see :func:`~.model_zoo.get_recipe`.
        input_px: height and width; by default those of the published FLOPs.

    Raises:
        ValueError: no such model, or an input without pixels.
        ImportError: the model is a detector, and Detectron2 is not installed.
    """
    entry = model_zoo.get_recipe(name)
    shape = model_zoo.TASKS[entry.task].input_shape
    if input_px is not None:
        if min(input_px) < 1:
            raise ValueError(f"input_px must be at least 1 x 1, got {input_px}")
        shape = (*shape[:2], *input_px)
    classifier = entry.task == "classification"

    # On ``meta``, where only shapes are computed
    model = model_zoo.build(name, "meta")
    run = prepare_call(model, entry.task, shape, train=classifier)
    official, _ = count_operators(model, run, complete=False)
    run = prepare_call(model, entry.task, shape)
    complete, peak_bytes = count_operators(model, run, complete=True)
    run = prepare_call(model, entry.task, (2, *shape[1:]), train=True)
    saved = saved_bytes_by_module(model, run)

    rows: dict[str, Size] = {part: Size(parameters=0, saved_mib=0.0) for _, part in _PARTS}
    operators: dict[str, Size] = defaultdict(Size)
    for parameter_name, parameter in model.named_parameters():
        row = rows[part_of(parameter_name)]
        row.parameters = (row.parameters or 0) + parameter.numel()
    for module, num_bytes in saved.items():
        row = rows[part_of(module)]
        row.saved_mib = (row.saved_mib or 0.0) + num_bytes / 2 / 2**20
    for (module, operator), (_, flops) in official.items():
        for row in (rows[part_of(module)], operators[operator]):
            row.official_gflops += flops / 1e9
    for (module, operator), (calls, flops) in complete.items():
        for row in (rows[part_of(module)], operators[operator]):
            row.calls += calls
            row.complete_gflops += flops / 1e9
    parts = {part: row for part, row in rows.items() if row.parameters}
    return Analysis(
        name,
        shape,
        entry.published_parameters_m if isinstance(entry, model_zoo.Entry) else None,
        entry.published_gflops if isinstance(entry, model_zoo.Entry) else None,
        _total(parts.values()),
        peak_bytes / 2**20,
        parts,
        {name: row for name, row in operators.items() if name not in FREE_OPERATORS},
    )


def prepare_call(
    model: nn.Module, task: str, shape: Sequence[int], *, train: bool = False
) -> Callable[[], Any]:
    """A call of a model of ``task`` on images of ``shape``, in the mode that is put on here."""
    model.train(train)
    images = torch.empty(tuple(shape), device=next(model.parameters()).device)
    if task != "detection":
        return lambda: model(images)
    sampled = {"num_proposals": 512, "num_detections": 128} if train else {}
    return lambda: forward_all_layers(model, images, **sampled)


def _total(rows: Iterable[Size]) -> Size:
    rows = list(rows)
    return Size(
        sum(row.parameters or 0 for row in rows),
        sum(row.calls for row in rows),
        sum(row.official_gflops for row in rows),
        sum(row.complete_gflops for row in rows),
        sum(row.saved_mib or 0.0 for row in rows),
    )
