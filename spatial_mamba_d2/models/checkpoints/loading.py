"""Checkpoints: recognise by their keys, translate, load strictly, report.

The authors' parameter names and ours are in bijection (:func:`to_official`, :func:`to_ours`), so a
checkpoint can go either way. Files are read by :mod:`.reading`, without running code from them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spatial_mamba_d2.models.checkpoints.reading import WeightsError, read_checkpoint

StateDict = dict[str, Tensor]

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
_UPERNET_NAMES = (
    *((rf"^decode_head\.psp_modules\.{i}\.1\.", f"decode_head.pool_convs.{i}.") for i in range(4)),
    (r"^decode_head\.bottleneck\.", "decode_head.pool_fuse."),
    (r"^decode_head\.lateral_convs\.", "decode_head.laterals."),
    (r"^decode_head\.fpn_convs\.", "decode_head.outputs."),
    (r"^decode_head\.fpn_bottleneck\.", "decode_head.fuse."),
    (r"^decode_head\.conv_seg\.", "decode_head.classify."),
    (r"^auxiliary_head\.convs\.0\.", "auxiliary_head.conv."),
    (r"^auxiliary_head\.conv_seg\.", "auxiliary_head.classify."),
)
#: Beginnings of our names of all that the authors' Mask R-CNN has beside its backbone.
MASK_RCNN_HEADS = tuple(ours for _, ours in _MASK_RCNN_NAMES)
_OFFICIAL_BACKBONE_PREFIX = "backbone."
DETECTOR_BACKBONE_PREFIX = "backbone.bottom_up."
SEGMENTOR_BACKBONE_PREFIX = "backbone."
_SEGMENTOR_MARK = "decode_head."  # names that only a segmentor has begin so, theirs and ours


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


_TO_OURS = {"backbone": _BACKBONE_NAMES, "heads": (*_MASK_RCNN_NAMES, *_UPERNET_NAMES)}
_TO_OFFICIAL = {
    part: tuple(_invert(*row) for row in reversed(table)) for part, table in _TO_OURS.items()
}


def to_ours(name: str, *, segmentor: bool = False) -> str:
    """Our name of a parameter or buffer, from its official one.

    Names of the classifier and the bare backbone have no prefix on either side; ``backbone.*``
    stays so in a segmentor, and becomes ``backbone.bottom_up.*`` in a detector.
    """
    if name.startswith(_OFFICIAL_BACKBONE_PREFIX):
        rest = name.removeprefix(_OFFICIAL_BACKBONE_PREFIX)
        prefix = SEGMENTOR_BACKBONE_PREFIX if segmentor else DETECTOR_BACKBONE_PREFIX
        return prefix + _rename(rest, _TO_OURS["backbone"])
    return _rename(_rename(name, _TO_OURS["heads"]), _TO_OURS["backbone"])


def to_official(name: str) -> str:
    """The official name of a parameter or buffer, from ours; the inverse of :func:`to_ours`."""
    name = _rename(name, _TO_OFFICIAL["heads"])
    for prefix in (DETECTOR_BACKBONE_PREFIX, SEGMENTOR_BACKBONE_PREFIX):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return _OFFICIAL_BACKBONE_PREFIX + _rename(rest, _TO_OFFICIAL["backbone"])
    return _rename(name, _TO_OFFICIAL["backbone"])


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


def is_official(names: Iterable[str]) -> bool:
    """Whether a model with these parameters has the authors' names."""
    return any(re.match(r"(backbone\.)?patch_embed\.", name) for name in names)


def translate(state: Mapping[str, Tensor], source: str = "checkpoint") -> StateDict:
    """``state`` under our names, whoever wrote it: recognised by its keys.

    Raises:
        WeightsError: neither an official Spatial-Mamba checkpoint nor one of ours.
    """
    ours = any(re.match(r"(backbone\.(bottom_up\.)?)?stem\.", name) for name in state)
    if is_official(state):
        segmentor = any(name.startswith(_SEGMENTOR_MARK) for name in state)
        return {to_ours(name, segmentor=segmentor): value for name, value in state.items()}
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
            groups = _groups(self.new, most=len(self.new))
            lines.append(f"  new, at their initial values ({len(self.new)}): {groups}")
        if self.ignored:
            lines.append(f"  not used ({len(self.ignored)}): {_groups(self.ignored)}")
        if self.new or self.ignored:
            lines += self._table()
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """Tensors of each part of the model, and what became of them."""
        columns = {"loaded": self.loaded, "new": self.new, "not used": self.ignored}
        counts = [Counter(map(_part, names)) for names in columns.values()]
        parts = list(dict.fromkeys(part for count in counts for part in count))
        width = max(map(len, parts))
        lines = [f"  {'part':{width}}" + "".join(f"{column:>10}" for column in columns)]
        for part in parts:
            cells = (f"{count[part] or '-':>10}" for count in counts)
            lines.append(f"  {part:{width}}" + "".join(cells))
        return lines


def _part(name: str) -> str:
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
    source_name: str | None = None,
) -> LoadReport:
    """Load a checkpoint of ours or of the authors into ``model``, strictly.

    What a backbone and a classifier of the same variant do not share is no error: the classifier's
    ``norm`` and ``head`` are not used by a backbone, whose ``output_norms`` are then new. The
    checkpoint of a detector or a segmentor gives another kind of model its backbone, and any
    checkpoint does so to a detector or a segmentor, whose other parts are then new.

    Args:
        model: a backbone, a classifier, or a detector or segmentor around one.
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
    state, new = _fit_backbone(state, target)
    may_lack, may_hold = _tolerated(state, target)
    may_lack += new
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


def backbone_prefix(names: Iterable[str]) -> str:
    """What stands in front of the backbone's own names."""
    prefixes = (DETECTOR_BACKBONE_PREFIX, SEGMENTOR_BACKBONE_PREFIX)
    stems = [prefix for prefix in prefixes if any(n.startswith(f"{prefix}stem.") for n in names)]
    return stems[0] if stems else ""


def _fit_backbone(
    state: StateDict, target: Mapping[str, Tensor]
) -> tuple[StateDict, tuple[str, ...]]:
    """``state`` for a model that has the names of ``target``, and the names it then lacks.

    In a model of another kind the backbone has another prefix, and is all that both have.
    """
    theirs, ours = backbone_prefix(state), backbone_prefix(target)
    if theirs == ours:
        return state, ()
    moved = {
        ours + name.removeprefix(theirs): value
        for name, value in state.items()
        if name.startswith(theirs)
    }
    return moved, tuple(name for name in target if not name.startswith(ours))


def _tolerated(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prefixes of names that ``state`` may lack, and that it may hold in vain."""
    prefix = backbone_prefix(target)
    from_classifier = f"{prefix}head.weight" in state
    to_classifier = "head.weight" in target
    output_norms, classifier = f"{prefix}output_norms.", (f"{prefix}norm.", f"{prefix}head.")
    may_lack = (output_norms,) if from_classifier and not to_classifier else ()
    may_hold = (output_norms,) if to_classifier else (output_norms, *classifier)
    return may_lack, may_hold
