"""Checkpoints: read safely, recognise by their keys, translate, load strictly, report.

The authors' parameter names and ours are in bijection (:func:`to_official`, :func:`to_ours`), so a
checkpoint can go either way. Nothing here executes code from a file: tensors come through
``torch.load(weights_only=True)`` or safetensors, and objects of foreign classes that real
checkpoints carry along (configurations, logs) become empty stand-ins.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# Objects of these packages occur in published checkpoints beside the weights. They are never
# imported: something inert takes their place. A reference to anything else is refused.
_INERT_PACKAGES = (
    "addict", "argparse", "datetime", "fvcore", "mmcv", "mmengine", "numpy", "omegaconf", "pathlib",
    "yacs",
)  # fmt: skip
# Subclasses of dict among them; PyTorch's safe unpickler fills exact dictionaries only.
_INERT_MAPPINGS = ("CfgNode", "ConfigDict", "Dict")
_WRAPPERS = ("state_dict", "model", "model_ema")

# Official name <-> ours, applied in this order; each row is a bijection on the names it touches.
_BACKBONE_NAMES = (
    (r"^patch_embed\.", "stem."),
    (r"^layers\.", "stages."),
    (r"\.self_attention\.", ".ssm."),
    (r"\.ln_1\.", ".ln1."),
    (r"\.ln_2\.", ".ln2."),
    (r"\.downsample\.conv\.0\.", ".downsample.expand."),
    (r"\.downsample\.conv\.1\.", ".downsample.reduce."),
    (r"\.downsample\.conv\.2\.", ".downsample.project."),
    (r"\.ssm\.conv2d\.", ".ssm.conv."),
    (r"\.ssm\.x_proj_weight$", ".ssm.x_proj.weight"),
    (r"\.ssm\.dt_projs_weight$", ".ssm.dt_proj.weight"),
    (r"\.ssm\.dt_projs_bias$", ".ssm.dt_bias"),
    (r"\.ssm\.A_logs$", ".ssm.A_log"),
    (r"\.ssm\.Ds$", ".ssm.D"),
    (r"\.state_fusion\.kernel_3$", ".fusion.kernel_d1"),
    (r"\.state_fusion\.kernel_3_1$", ".fusion.kernel_d3"),
    (r"\.state_fusion\.kernel_3_2$", ".fusion.kernel_d5"),
    (r"\.state_fusion\.alpha$", ".fusion.alpha"),
    *((rf"^outnorm{i}\.", f"output_norms.res{i + 2}.") for i in range(4)),
)
_MASK_RCNN_NAMES = (
    *((rf"^neck\.lateral_convs\.{i}\.conv\.", f"backbone.fpn_lateral{i + 2}.") for i in range(4)),
    *((rf"^neck\.fpn_convs\.{i}\.conv\.", f"backbone.fpn_output{i + 2}.") for i in range(4)),
    (r"^rpn_head\.rpn_conv\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn_head\.rpn_cls\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn_head\.rpn_reg\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc1."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc2."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    *(
        (rf"^roi_head\.mask_head\.convs\.{i}\.conv\.", f"roi_heads.mask_head.mask_fcn{i + 1}.")
        for i in range(4)
    ),
    (r"^roi_head\.mask_head\.upsample\.", "roi_heads.mask_head.deconv."),
    (r"^roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_head.predictor."),
)
_OFFICIAL_BACKBONE_PREFIX = "backbone."
DETECTOR_BACKBONE_PREFIX = "backbone.bottom_up."


class WeightsError(ValueError):
    """A checkpoint cannot be read, recognised, or loaded as it is."""


def _invert(pattern: str, replacement: str) -> tuple[str, str]:
    """The row that undoes ``(pattern, replacement)``; both are literals with optional anchors."""
    start, end = pattern.startswith("^"), pattern.endswith("$")
    literal = pattern.strip("^$").replace("\\.", ".")
    anchored = ("^" if start else "") + re.escape(replacement) + ("$" if end else "")
    return anchored, literal


def _rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


_TO_OURS = {"backbone": _BACKBONE_NAMES, "mask_rcnn": _MASK_RCNN_NAMES}
_TO_OFFICIAL = {
    part: tuple(_invert(*row) for row in reversed(table)) for part, table in _TO_OURS.items()
}


def to_ours(name: str) -> str:
    """Our name of a parameter or buffer, from its official one.

    Names of the classifier and the bare backbone have no prefix on either side; in a detector
    ``backbone.*`` becomes ``backbone.bottom_up.*``.
    """
    if name.startswith(_OFFICIAL_BACKBONE_PREFIX):
        rest = name.removeprefix(_OFFICIAL_BACKBONE_PREFIX)
        return DETECTOR_BACKBONE_PREFIX + _rename(rest, _TO_OURS["backbone"])
    return _rename(_rename(name, _TO_OURS["mask_rcnn"]), _TO_OURS["backbone"])


def to_official(name: str) -> str:
    """The official name of a parameter or buffer, from ours; the inverse of :func:`to_ours`."""
    if name.startswith(DETECTOR_BACKBONE_PREFIX):
        rest = name.removeprefix(DETECTOR_BACKBONE_PREFIX)
        return _OFFICIAL_BACKBONE_PREFIX + _rename(rest, _TO_OFFICIAL["backbone"])
    return _rename(_rename(name, _TO_OFFICIAL["backbone"]), _TO_OFFICIAL["mask_rcnn"])


class _Inert:
    """Stands for an object of a foreign class in a checkpoint: keeps nothing, does nothing."""

    def __new__(cls, *args: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a ``.safetensors`` or PyTorch checkpoint onto the CPU without executing code from it.

    Args:
        path: the file.

    Returns:
        the dictionary in the file; foreign objects in it are empty stand-ins.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: truncated, not a checkpoint, or it refers to code that we do not accept.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise WeightsError(f"weights: {path} is empty; it was probably never fully written")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"weights: {path} is a web page, not a checkpoint; download it again")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    inert: list[tuple[type, str]] = []
    if head.startswith(b"PK"):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
            raise _unreadable(path, error) from error
        refused = [name for name in names if name.split(".")[0] not in _INERT_PACKAGES]
        if refused:
            raise WeightsError(
                f"weights: {path} refers to {', '.join(sorted(refused))}, which is not data; "
                "refused, because loading it would run code from the file"
            )
        inert = [(_stand_in(name), name) for name in names]
    try:
        with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types here, all of them about this file
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights: {path} must hold a dictionary, got {type(content).__name__}")
    return dict(content)


def _stand_in(name: str) -> type:
    if name.rsplit(".", 1)[-1] in _INERT_MAPPINGS:
        return OrderedDict
    return type("Inert", (_Inert,), {})


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> WeightsError:
    size = path.stat().st_size
    reason = str(error).strip().split("\n")[0]
    return WeightsError(
        f"weights: {path} ({size} bytes) is truncated or not a PyTorch checkpoint: {reason}"
    )


def unwrap(content: Mapping[str, Any], source: str = "checkpoint") -> StateDict:
    """The state dict in ``content``: bare, or under ``state_dict``, ``model`` or ``model_ema``.

    Raises:
        WeightsError: there is none.
    """
    for key in _WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {
        name.removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise WeightsError(
            f"weights: {source} holds no tensors, neither bare nor under {', '.join(_WRAPPERS)}; "
            f"its keys: {', '.join(map(str, list(content)[:8])) or 'none'}"
        )
    return state


def translate(state: Mapping[str, Tensor], source: str = "checkpoint") -> StateDict:
    """``state`` under our names, whoever wrote it: recognised by its keys.

    Raises:
        WeightsError: neither an official Spatial-Mamba checkpoint nor one of ours.
    """
    official = any(re.match(r"(backbone\.)?patch_embed\.", name) for name in state)
    ours = any(re.match(r"(backbone\.bottom_up\.)?stem\.", name) for name in state)
    if official:
        return {to_ours(name): value for name, value in state.items()}
    if ours:
        return dict(state)
    raise WeightsError(
        f"weights: none of the {len(state)} keys of {source} belongs to a Spatial-Mamba model "
        f"(first keys: {', '.join(list(state)[:4])})"
    )


@dataclass
class LoadReport:
    """What :func:`load_weights` did.

    Attributes:
        source: file name, or what the caller said.
        loaded: names of the model's parameters and buffers that were set.
        new: names that the checkpoint does not have and may lack: they keep their initial values.
        ignored: names in the checkpoint for which the model has no place and needs none.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {len(self.loaded)} tensors loaded"]
        if self.new:
            lines.append(f"  new, at their initial values ({len(self.new)}): {_groups(self.new)}")
        if self.ignored:
            lines.append(f"  not used ({len(self.ignored)}): {_groups(self.ignored)}")
        return "\n".join(lines)


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
    source_name: str | None = None,
) -> LoadReport:
    """Load a checkpoint of ours or of the authors into ``model``, strictly.

    What a backbone and a classifier of the same variant do not share is no error: the classifier's
    ``norm`` and ``head`` are not used by a backbone, whose ``output_norms`` are then new, and a
    detector's checkpoint gives a bare backbone its backbone.

    Args:
        model: a backbone, a classifier, or a detector around one.
        source: file, or the content of one.
        skip: prefixes of (our) names that keep their initial values, whatever the file has: for
            example ``["head."]`` to fine-tune a classifier to other classes.
        source_name: what the report and the errors call ``source``.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file is broken or no Spatial-Mamba checkpoint, of another variant or
            another number of classes, or a parameter is left without a value. The model is then
            unchanged.
    """
    if isinstance(source, Mapping):
        name, content = source_name or "the given state dict", source
    else:
        name, content = source_name or str(source), read_checkpoint(source)
    state = translate(unwrap(content, name), name)
    target = model.state_dict()
    may_lack, may_hold = _tolerated(state, target)
    if any(key.startswith("stem.") for key in target):
        state = _bare(state)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(skip))}

    report = LoadReport(
        name,
        loaded=[key for key in target if key in state],
        new=[key for key in target if key not in state],
        ignored=[key for key in state if key not in target],
    )
    problems = []
    if missing := [key for key in report.new if not key.startswith((*may_lack, *skip))]:
        problems.append(f"the model needs, and the file lacks, {len(missing)}: {_groups(missing)}")
    if unknown := [key for key in report.ignored if not key.startswith(may_hold)]:
        problems.append(f"the file has, and the model lacks, {len(unknown)}: {_groups(unknown)}")
    if wrong := [key for key in report.loaded if state[key].shape != target[key].shape]:
        examples = ", ".join(
            f"{key} is {list(state[key].shape)}, must be {list(target[key].shape)}"
            for key in wrong[:3]
        )
        problems.append(
            f"{len(wrong)} have another shape (another variant or number of classes): {examples}"
        )
    if not report.loaded:
        problems.append("no key matches")
    if problems:
        raise WeightsError(
            f"weights: {name} does not fit {type(model).__name__}; nothing was loaded:\n  "
            + "\n  ".join(problems)
        )
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report


def _bare(state: StateDict) -> StateDict:
    """The backbone's part of a detector's ``state``, without prefix; else ``state`` itself."""
    prefix = DETECTOR_BACKBONE_PREFIX
    inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return inner or state


def _tolerated(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prefixes of names that ``state`` may lack, and that it may hold in vain."""
    from_classifier = "head.weight" in state
    to_classifier = "head.weight" in target
    may_lack = ("output_norms.",) if from_classifier and not to_classifier else ()
    may_hold = ("output_norms.",) if to_classifier else ("output_norms.", "norm.", "head.")
    return may_lack, may_hold
