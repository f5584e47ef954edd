"""Strict loading of checkpoints: the one way in which weights get into a model.

Files are read by :mod:`.reading`, which runs no code from them, and names are translated by
:mod:`.names`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spatial_mamba_d2.models.checkpoints.matching import find_timm_backbone, match
from spatial_mamba_d2.models.checkpoints.names import enclosing_prefix
from spatial_mamba_d2.models.checkpoints.reading import (
    WeightsError,
    read_checkpoint,
    unwrap,
)
from spatial_mamba_d2.system.tables import console_table

# Some trainers do not save it, nor do frozen batch norms of other libraries have it; it has no
# effect.
_COUNTERS = ".num_batches_tracked"

# Of classifiers, segmentors and detectors
_CLASS_LAYERS = re.compile(r"(^|\.)(head|classify|cls_score|cls_logits)\.weight$")


@dataclass
class LoadReport:
    """What :func:`load_weights` did.

    Attributes:
        source: file name, or the caller's ``source_name``.
        loaded: names of the model's parameters and buffers that were set.
        inflated: the one among them whose RGB weights became those of other channels, if any.
        new: names of the model that were not set and keep their initial values.
        ignored: names in the checkpoint, under its own prefix, that the model does not use.
        stripped: what was removed from names in the checkpoint, such as ``module.``.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    inflated: str = ""
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    stripped: list[str] = field(default_factory=list)

    @property
    def has_class_layers(self) -> bool:
        """Whether a layer with an output for each class was loaded, so that their order counts."""
        return any(_CLASS_LAYERS.search(name) for name in self.loaded)

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {len(self.loaded)} tensors loaded"]
        if self.inflated:
            lines.append(f"  from RGB to other channels: {self.inflated}")
        if self.stripped:
            lines.append(f"  removed from names: {', '.join(self.stripped)}")
        if self.new:
            groups = _groups(self.new, most=len(self.new))
            lines.append(f"  new, at their initial values ({len(self.new)}): {groups}")
        if self.ignored:
            lines.append(f"  not used ({len(self.ignored)}): {_groups(self.ignored)}")
        if self.new or self.ignored:
            lines += self._table()
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """How many tensors of each part were loaded, are new, or are not used."""
        columns = {"loaded": self.loaded, "new": self.new, "not used": self.ignored}
        counts = [Counter(map(_row, names)) for names in columns.values()]
        parts = dict.fromkeys(part for count in counts for part in count)
        rows = [(part, *(str(count[part] or "-") for count in counts)) for part in parts]
        table = console_table(("part", *columns), rows)
        return [f"  {line}" for line in table.splitlines()]


def _row(name: str) -> str:
    """``backbone.bottom_up.stages.1.blocks.0.ln1.weight`` -> ``backbone.bottom_up.stages.1``."""
    part = re.match(r"((backbone|bottom_up|stages|roi_heads)\.)*[^.]+", name)
    return part[0] if part else name


def _groups(names: Sequence[str], most: int = 8) -> str:
    """``a.b.weight, a.b.bias, ...`` -> ``a.b.*, ...``, at most ``most`` groups."""
    groups = list(dict.fromkeys(name.rsplit(".", 1)[0] + ".*" for name in names))
    more = f", and {len(groups) - most} more" if len(groups) > most else ""
    return ", ".join(groups[:most]) + more


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    skip: Sequence[str] = (),
    partial: bool = True,
    source_name: str | None = None,
) -> LoadReport:
    """Load a checkpoint of ours or of the authors into ``model``, strictly.

    A model around a backbone of timm takes its own checkpoints, and those of timm's classifier.
    Prefixes that trainers leave in names are removed, and a module around one model of ours, such
    as an encoder, gets that one's weights. Every parameter of the model gets a value, with the
    exceptions in the table at :func:`.matching._exceptions`: a backbone needs no classifier layers,
    for example, and any checkpoint with a backbone can initialise that of a detector or a
    segmentor, whose heads are then new. Stages that the model does not have may be unused, and the
    counters ``num_batches_tracked`` may be missing.

    Args:
        model: a backbone, a classifier, or a detector or segmentor around one.
        source: file, or the content of one.
        skip: prefixes of the model's (our) names that keep their initial values even if the file
            has them: for example ``["head."]`` to fine-tune a classifier to other classes.
        partial: accept the exceptions, and RGB weights for images of other channels, see
            :func:`widen_rgb`; if False, every parameter of the model must be
            loaded.
        source_name: what the report and the errors call ``source``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a prefix in ``skip`` matches no parameter of the model.
        WeightsError: the file is broken or no checkpoint of such a model, of another variant or
            another number of classes, a parameter has no value, or not a finite one. The model is
            then unchanged.
    """
    if isinstance(source, Mapping):
        name, content = source_name or "the given state dict", source
    else:
        name, content = source_name or str(source), read_checkpoint(source)
    target = model.state_dict()
    _check_skip(skip, target)
    place = "" if find_timm_backbone(model) else enclosing_prefix(target)
    if place:
        return _load_inside(model, place, content, skip, partial, name)
    fit = match(model, unwrap(content, name), name, partial=partial)
    state, file_names = fit.state, fit.file_names
    used = {own for key, own in file_names.items() if key in target}

    def is_skipped(key: str) -> bool:
        return key.startswith(tuple(skip))

    report = LoadReport(
        name,
        loaded=[key for key in target if key in file_names and not is_skipped(key)],
        new=[key for key in target if key not in file_names or is_skipped(key)],
        ignored=[name for name in state if name not in used],
        stripped=fit.stripped,
    )
    problems = []
    new = [n for n in report.new if not n.endswith(_COUNTERS)]
    missing = [n for n in new if not is_skipped(n) and not fit.may_be_new(n)]
    if missing:
        problems.append(f"missing from the file ({len(missing)}): {_groups(missing)}")
    unused = [n for n in report.ignored if not n.endswith(_COUNTERS)]
    if unknown := [n for n in unused if not fit.may_be_unused(n)]:
        problems.append(f"unknown to the model ({len(unknown)}): {_groups(unknown)}")
    key = fit.first_conv
    if partial and key in report.loaded and _is_of_rgb(state[file_names[key]], target[key]):
        weight = state[file_names[key]]
        num_channels = target[key].shape[1]
        state = {**state, file_names[key]: widen_rgb(weight, num_channels)}
        report.inflated = key
    shapes = {key: (state[file_names[key]].shape, target[key].shape) for key in report.loaded}
    if wrong := [key for key, (found, needed) in shapes.items() if found != needed]:
        problems.append(_other_shapes(wrong, shapes, target))
    if not report.loaded:
        problems.append("no key matches")
    if problems:
        raise WeightsError(
            f"weights: {name} does not fit {type(model).__name__}; nothing was loaded:\n  "
            + "\n  ".join(problems)
        )
    if new and not partial:
        raise _incomplete(model, new, name)
    model.load_state_dict({key: state[file_names[key]] for key in report.loaded}, strict=False)
    return report


def widen_rgb(weight: Tensor, num_channels: int) -> Tensor:
    """The first convolution of RGB images -> that of other channels.

    Channel ``i`` gets the weights of R, G or B, ``i % 3``, divided by the number of channels that
    do. So of images that repeat their bands R, G, B, R, ... and of grey ones that repeat one band,
    the output is that of RGB. One or two channels share the sum of the weights, as grey does.

    Args:
        weight: ``Tensor[N, 3, h, w]``.
    """
    if num_channels < 3:
        return weight.sum(1, keepdim=True).repeat(1, num_channels, 1, 1) / num_channels
    sources = torch.arange(num_channels, device=weight.device) % 3
    counts = sources.bincount()[sources].to(weight)
    return weight[:, sources] / counts[:, None, None]


def _is_of_rgb(weight: Tensor, needed: Tensor) -> bool:
    """Whether a first convolution has RGB weights in the file and other channels in the model."""
    (out_dim, channels, *kernel), shape = weight.shape, needed.shape
    return channels == 3 and shape[1] != 3 and [out_dim, *kernel] == [shape[0], *shape[2:]]


def _incomplete(model: nn.Module, new: Sequence[str], source: str) -> WeightsError:
    return WeightsError(
        f"weights: {source} must hold all parameters of {type(model).__name__}; nothing was "
        f"loaded:\n  missing or skipped ({len(new)}): {_groups(new)}"
    )


def _load_inside(
    model: nn.Module,
    place: str,
    content: Mapping[str, Any],
    skip: Sequence[str],
    partial: bool,
    source: str,
) -> LoadReport:
    """Load the one Spatial-Mamba model inside ``model``, whose names begin with ``place``."""
    outside = [name for name in model.state_dict() if not name.startswith(place)]
    if outside and not partial:
        raise _incomplete(model, outside, source)
    inner = model.get_submodule(place.removesuffix("."))
    inner_skip = [prefix.removeprefix(place) for prefix in skip if prefix.startswith(place)]
    report = load_weights(inner, content, skip=inner_skip, partial=partial, source_name=source)
    report.loaded = [place + name for name in report.loaded]
    report.new = [place + name for name in report.new] + outside
    return report


def load_for_prediction(model: nn.Module, path: str) -> dict[str, Any]:
    """Load all of ``model``, which must be complete, from the file that ``MODEL.WEIGHTS`` names.

    Returns:
        what the file holds, such as the names of the classes.

    Raises:
        FileNotFoundError, WeightsError: see :func:`load_weights`.
        ValueError: no file is named.
    """
    if not path:
        raise ValueError("MODEL.WEIGHTS must name a checkpoint to predict with, got ''")
    content = read_checkpoint(path)
    load_weights(model, content, partial=False, source_name=path)
    return content


def _check_skip(skip: Sequence[str], target: Iterable[str]) -> None:
    names = list(target)
    for prefix in skip:
        if not any(name.startswith(prefix) for name in names):
            modules = sorted({name.rsplit(".", 1)[0] for name in names})
            nearest = difflib.get_close_matches(prefix, modules, n=1, cutoff=0.0)
            raise ValueError(
                f"skip (MODEL.WEIGHTS_SKIP) must be prefixes of the model's parameters, got "
                f"{prefix!r}, which matches none of them; the nearest one is {nearest[0]!r}"
            )


def _other_shapes(
    wrong: Sequence[str], shapes: Mapping[str, tuple[Any, Any]], target: Iterable[str]
) -> str:
    examples = ", ".join(
        f"{key} is {list(shapes[key][0])}, must be {list(shapes[key][1])}" for key in wrong[:3]
    )
    prefixes = _prefixes(wrong, target)
    hint = ""
    if len(wrong) < 20 and len(prefixes) < 6:  # heads, and not another variant of the model
        words = f"({', '.join(map(repr, prefixes))},)"
        hint = f'; to train them from their initial values: MODEL.WEIGHTS_SKIP "{words}"'
    return (
        f"{len(wrong)} have another shape (another variant or number of classes): {examples}{hint}"
    )


def _prefixes(names: Sequence[str], target: Iterable[str]) -> list[str]:
    """The shortest names of modules, or parameters, that have all of ``names`` and no others."""
    others = [name for name in target if name not in names]
    prefixes: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        candidates = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
        prefixes[next(c for c in candidates if not any(o.startswith(c) for o in others))] = None
    return list(prefixes)
