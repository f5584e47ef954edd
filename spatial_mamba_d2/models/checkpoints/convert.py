"""Writing of checkpoints: for the authors' code, for Detectron2, as safetensors, or as ours.

Only complete models are written: a state with a missing or unknown tensor, or one of another
shape, is refused, so that a partial file is written only on request.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spatial_mamba_d2.models import (
    VARIANTS,
    SpatialMambaBackbone,
    SpatialMambaClassifier,
    UPerNet,
)
from spatial_mamba_d2.models.checkpoints.names import (
    DETECTOR_BACKBONE_PREFIX,
    MASK_RCNN_HEADS,
    backbone_prefix,
    model_kind,
    to_official,
    translate,
)
from spatial_mamba_d2.models.checkpoints.reading import WeightsError, read_checkpoint, unwrap
from spatial_mamba_d2.models.checkpoints.writing import write_safetensors
from spatial_mamba_d2.system.atomic import replacing

FORMATS = ("official", "ours", "detectron2", "safetensors")
PARTS = ("backbone",)
_CLASSIFIER_ONLY = ("norm.", "head.")
_RATIOS = {"ssm_ratio": 2.0, "mlp_ratio": 4.0}  # of all published variants


@dataclass(frozen=True)
class Contents:
    """What a state dict (under our names) holds.

    Attributes:
        kind: ``"classifier"``, ``"backbone"``, ``"detector"`` or ``"segmentor"``.
        variant: ``"tiny"``, ``"small"``, ``"base"``, or ``"custom"`` for other widths and depths.
        tensors: their number.
        parameters: elements of the tensors that are no batch-norm statistics.
    """

    kind: str
    variant: str
    tensors: int
    parameters: int

    def __str__(self) -> str:
        return f"{self.variant} {self.kind}, {self.tensors} tensors, {self.parameters:,} parameters"


def inspect_state(state: Mapping[str, Tensor], source: str = "the given state") -> Contents:
    """Recognise a state dict under our names, and check that nothing is missing or unknown.

    Of a detector's heads only Mask R-CNN's standard ones are known; others are not checked.

    Raises:
        WeightsError: it is not a complete model.
    """
    kind = model_kind(state)
    prefix = backbone_prefix(state)
    backbone = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    # A detector's feature pyramid has names inside of a backbone that is not its bottom-up part.
    backbone = {n: x for n, x in backbone.items() if not n.startswith(("fpn_", "top_block."))}
    arguments = backbone_arguments(backbone, source)
    with torch.device("meta"):
        model: nn.Module
        if kind == "classifier":
            model = SpatialMambaClassifier(len(state["head.weight"]), **arguments)
        elif kind == "segmentor":
            model = UPerNet(**segmentor_arguments(state, source), **arguments)
        else:
            model = SpatialMambaBackbone(**arguments)
    expected = model.state_dict()
    _compare(state if kind == "segmentor" else backbone, expected, kind, source)
    variant = find_variant(arguments)
    sizes = (x.numel() for name, x in state.items() if not _is_statistic(name))
    return Contents(kind, variant or "custom", len(state), sum(sizes))


def _is_statistic(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))


def find_variant(arguments: Mapping[str, Any]) -> str | None:
    """The published variant that a model with these arguments is, for images of any channels."""
    for name, values in VARIANTS.items():
        variant = {**_RATIOS, **values}
        if all(variant[key] == arguments[key] for key in ("embed_dim", "depths", *_RATIOS)):
            return name
    return None


def backbone_arguments(backbone: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What the names and shapes of a bare backbone, or a classifier, say about its arguments.

    Raises:
        WeightsError: parts are missing.
    """
    depths = [0] * 4
    for name in backbone:
        if match := re.match(r"stages\.([0-3])\.blocks\.(\d+)\.", name):
            stage, block = map(int, match.groups())
            depths[stage] = max(depths[stage], block + 1)
    widest, first = "stem.conv3.1.conv.weight", "stem.conv1.conv.weight"
    if not {widest, first} <= set(backbone) or 0 in depths:
        raise WeightsError(
            f"weights: {source} does not hold a complete backbone: {depths} blocks per stage"
        )
    dim = len(backbone[widest])
    widths = {"ssm_ratio": "ssm.D", "mlp_ratio": "mlp.fc1.bias"}
    sizes = {key: backbone.get(f"stages.0.blocks.0.{name}") for key, name in widths.items()}
    ratios = {key: len(x) / dim for key, x in sizes.items() if x is not None}
    return {
        "embed_dim": dim,
        "depths": tuple(depths),
        "in_chans": backbone[first].shape[1],
        **_RATIOS,
        **ratios,
    }


def segmentor_arguments(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """What the names and shapes of a UPerNet say about its heads.

    Raises:
        WeightsError: parts are missing.
    """
    names = ("decode_head.classify.weight", "auxiliary_head.classify.weight")
    if absent := [name for name in names if name not in state]:
        raise WeightsError(
            f"weights: {source} is not a complete UPerNet: {', '.join(absent)} is missing"
        )
    num_classes, channels = state[names[0]].shape[:2]
    return {
        "num_classes": num_classes,
        "channels": channels,
        "aux_channels": state[names[1]].shape[1],
    }


def _compare(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, source: str
) -> None:
    optional = () if kind in ("segmentor", "detector") else ("output_norms.",)
    problems = {
        "missing": [n for n in expected if n not in state and not n.startswith(optional)],
        "unknown": [n for n in state if n not in expected],
        "of another shape": [
            n for n in expected if n in state and state[n].shape != expected[n].shape
        ],
    }
    found = [f"{len(n)} {text}, such as {n[0]}" for text, n in problems.items() if n]
    if found:
        raise WeightsError(f"weights: {source} is not a complete {kind}: {'; '.join(found)}")


def keep_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone alone, under its own names, of a state dict under our names."""
    prefix = backbone_prefix(state)
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix)
        and not name.startswith(_CLASSIFIER_ONLY)
        and not name.startswith(("backbone.fpn_", "backbone.top_block."))
    }


def save_official(source: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a checkpoint that the authors' code loads.

    A classifier or a bare backbone lies under ``model``, as in the authors' ImageNet training and
    as their detection and segmentation configs take it for ``pretrained``; a complete detector or
    segmentor lies under ``state_dict``, as mmengine writes it.

    Args:
        source: a model, or its state dict under our names.
        path: a ``.pth`` file.

    Raises:
        WeightsError: no complete model, or one with heads that the authors' code does not have.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    _save(_official(state, inspect_state(state).kind), Path(path))


def _official(state: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    if kind == "detector":
        heads = {n for n in state if not n.startswith(DETECTOR_BACKBONE_PREFIX)}
        standard = {f"{name}{leaf}" for name in MASK_RCNN_HEADS for leaf in ("weight", "bias")}
        if unlike := sorted(heads ^ standard):
            raise WeightsError(
                "weights: --to official needs the heads of the authors' Mask R-CNN; "
                f"{len(unlike)} are missing or unknown, such as {unlike[0]}"
            )
    translated = {to_official(name): value for name, value in state.items()}
    if kind in ("classifier", "backbone"):
        return {"model": translated}
    return {"state_dict": translated, "meta": {}}


def _detectron2(state: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    if kind == "detector":
        return {"model": dict(state)}
    if kind == "backbone":
        return {"model": {DETECTOR_BACKBONE_PREFIX + name: x for name, x in state.items()}}
    raise WeightsError(
        f"weights: Detectron2 has no place for the other parts of a {kind}; --only backbone takes "
        "what it has"
    )


def _save(content: Mapping[str, Any], path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(content, temporary)


def convert_weights(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    only: str | None = None,
    sha256: str | None = None,
    overwrite: bool = True,
) -> Contents:
    """Read a checkpoint of ours or of the authors and write it in another format.

    Args:
        source: file; see :func:`~spatial_mamba_d2.models.read_checkpoint`.
        target: file to write; it appears only once it is complete.
        to: ``"official"``: for the authors' code, see :func:`save_official`; ``"ours"``: our names
            under ``model``; ``"detectron2"``: what Detectron2's own ``DetectionCheckpointer``
            loads into a model with ``build_spatial_mamba_fpn_backbone``; ``"safetensors"``: our
            names in a ``.safetensors`` file.
        only: ``"backbone"`` leaves out all other parts.
        sha256: that ``source`` must have.
        overwrite: replace ``target`` if it exists; never ``source``.

    Returns:
        what was written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown ``to`` or ``only``, a name of ``target`` that does not fit ``to``, or
            ``target`` is ``source``, or exists and may not be replaced.
        WeightsError: ``source`` is not readable, no complete model, or has parts that the format
            cannot hold.
    """
    target = Path(target)
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if only not in (None, *PARTS):
        raise ValueError(f"only must be one of {', '.join(PARTS)}, got {only!r}")
    if (target.suffix == ".safetensors") != (to == "safetensors"):
        raise ValueError(
            f"target must end with .safetensors for safetensors and for nothing else, "
            f"got {target} for {to}"
        )
    target = Path(os.path.abspath(target))  # new/../x is there once new is made
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ValueError(f"target must be another file than the source, got {target} for {source}")
    if target.exists() and not overwrite:
        raise ValueError(f"target exists already: {target}; --overwrite replaces it")
    state = translate(unwrap(read_checkpoint(source, sha256), str(source)), str(source))
    contents = inspect_state(state, str(source))
    if only == "backbone":
        state = keep_backbone(state)
        contents = inspect_state(state, str(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "official":
        _save(_official(state, contents.kind), target)
    elif to == "detectron2":
        _save(_detectron2(state, contents.kind), target)
    elif to == "ours":
        _save({"model": state}, target)
    else:
        write_safetensors(state, target)
    return contents
