"""Which tensors of a checkpoint belong to which parameters of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from spatial_mamba_d2.models.checkpoints.names import (
    backbone_prefix,
    model_kind,
    strip_owner,
    strip_wrappers,
    translate,
)
from spatial_mamba_d2.models.timm_backbone import TimmBackbone


@dataclass(frozen=True)
class Match:
    """How a file and a model fit together.

    Attributes:
        state: the tensors of the file, under our names.
        file_names: ``{name in the model: name in state}``, also of names that the model does not
            have.
        may_be_new: whether a parameter of the model may be missing from the file.
        may_be_unused: whether a tensor of the file may have no place in the model.
        first_conv: the model's parameter that depends on the channels of the images.
        stripped: what was removed from names, such as ``module.``.
    """

    state: Mapping[str, Tensor]
    file_names: Mapping[str, str]
    may_be_new: Callable[[str], bool]
    may_be_unused: Callable[[str], bool]
    first_conv: str
    stripped: list[str]


def match(
    model: nn.Module, state: Mapping[str, Tensor], source: str, *, partial: bool = True
) -> Match:
    """Match the state dict of a file with a model around a backbone, ours or one of timm.

    Args:
        partial: whether a detector may take what it shares with another architecture.

    Raises:
        WeightsError: ``state`` belongs to no model that ``model`` could take weights from.
    """
    if found := find_timm_backbone(model):
        return _match_timm(*found, state, source)
    return _match_spatial_mamba(model.state_dict(), state, source, partial)


def find_timm_backbone(model: nn.Module) -> tuple[str, TimmBackbone] | None:
    """The backbone of timm in ``model``, if there is one, after what precedes its names."""
    for place, module in model.named_modules():
        if isinstance(module, TimmBackbone):
            return f"{place}." if place else "", module
    return None


def _match_timm(
    place: str, backbone: TimmBackbone, state: Mapping[str, Tensor], source: str
) -> Match:
    """A file of the complete model, or of timm's classifier, which initialises the backbone.

    After the latter, level norms and heads are new. What the levels do not need, such as the last
    layer of the classifier, may be unused.
    """
    body = f"{place}body."
    names = strip_owner(state, {body, *backbone.body.state_dict()}, source)
    renamed: Mapping[str, Tensor] = {names[name]: value for name, value in state.items()}
    is_complete = any(name.startswith(body) for name in renamed)
    if not is_complete:
        renamed = backbone.to_own_names(renamed)
    return Match(
        renamed,
        {name if is_complete else body + name: name for name in renamed},
        may_be_new=lambda name: not is_complete and not name.startswith(body),
        may_be_unused=lambda name: not is_complete and name in backbone.removed,
        first_conv=f"{body}{backbone.first_conv}",
        stripped=_stripped_parts(names),
    )


def _match_spatial_mamba(
    target: Iterable[str], wrapped: Mapping[str, Tensor], source: str, partial: bool
) -> Match:
    state, target = translate(wrapped, source), list(target)
    parts_there = _detector_parts(state) if partial else set(_DETECTOR_PARTS)
    parts_here = _detector_parts(target) if partial else set(_DETECTOR_PARTS)
    ours, theirs = backbone_prefix(target), backbone_prefix(state)
    new, unused = _exceptions(state, target)
    last_stage = _last_stage(target)
    return Match(
        state,
        _names_in_model(state, target),
        may_be_new=lambda name: _part(name, ours) in new or _is_other(name, parts_there),
        may_be_unused=lambda name: (
            _part(name, theirs) in unused
            or _is_behind(name, theirs, last_stage)
            or _is_other(name, parts_here)
        ),
        first_conv=f"{ours}stem.conv1.conv.weight",
        stripped=_stripped_parts(strip_wrappers(wrapped)),
    )


# Parts of detectors that are complete or absent, by the beginnings of their parameters' names
_DETECTOR_PARTS = {
    **{f"p{n}": rf"backbone\.fpn_(lateral|output){n}\." for n in range(2, 6)},
    "p6 and p7": r"backbone\.top_block\.",
    "proposals": r"proposal_generator\.",
    "box head": r"roi_heads\.box_(head|predictor)\.[a-z]",
    "box heads of a cascade": r"roi_heads\.box_(head|predictor)\.\d",
    "mask head": r"roi_heads\.mask_head\.(mask_fcn\d|deconv|predictor)\.",
    "PointRend's mask head": r"roi_heads\.mask_head\.(coarse|point|parameter)_head\.",
    "keypoint head": r"roi_heads\.keypoint_head\.",
    "semantic head": r"sem_seg_head\.",
    "RetinaNet's head": r"head\.(cls|bbox)_",
}


def _detector_part(name: str) -> str | None:
    found = (part for part, pattern in _DETECTOR_PARTS.items() if re.match(pattern, name))
    return next(found, None)


def _detector_parts(names: Iterable[str]) -> set[str]:
    return {part for name in names if (part := _detector_part(name))}


def _is_other(name: str, parts: Collection[str]) -> bool:
    """Whether a parameter belongs to a part of detectors that is not among ``parts``."""
    part = _detector_part(name)
    return part is not None and part not in parts


def _stripped_parts(stripped: Mapping[str, str]) -> list[str]:
    """``{"module.model.head.bias": "head.bias"}`` -> ``["module.", "model."]``."""
    parts = Counter()  # type: Counter[str]
    for name, rest in stripped.items():
        parts |= Counter(name.split(".")) - Counter(rest.split("."))
    return [f"{part}." for part in parts]


def _last_stage(target: Iterable[str]) -> int:
    found = (re.search(r"(?:^|\.)stages\.(\d+)\.", name) for name in target)
    return max((int(match[1]) for match in found if match), default=0)


def _is_behind(name: str, prefix: str, last_stage: int) -> bool:
    """Whether a parameter belongs to a stage that a model with fewer stages does not have."""
    match = re.match(r"stages\.([0-3])\.(downsample\.)?", name.removeprefix(prefix))
    if not match:
        return False
    stage = int(match[1])
    return stage > last_stage or (stage == last_stage < 3 and match[2] is not None)


def _names_in_model(state: Iterable[str], target: Iterable[str]) -> dict[str, str]:
    """``{name in the model: name in the file}`` of all that both kinds of model may have.

    If the prefix of the backbone differs, that is the backbone.
    """
    state = list(state)
    theirs, ours = backbone_prefix(state), backbone_prefix(target)
    if theirs == ours:
        return {name: name for name in state}
    return {ours + name.removeprefix(theirs): name for name in state if name.startswith(theirs)}


def _part(name: str, prefix: str) -> str:
    """Which part of its model a parameter belongs to; ``prefix`` is that of the backbone."""
    if not name.startswith(prefix):
        return "heads"  # the feature pyramid of a detector is one of them
    name = name.removeprefix(prefix)
    if name.startswith("output_norms."):
        return "output norms"
    return "classifier layers" if name.startswith(("norm.", "head.")) else "backbone"


def _exceptions(state: Iterable[str], target: Iterable[str]) -> tuple[set[str], set[str]]:
    """The parts that may be new in the model, and those of the file that may be unused.

    =================== ==================== ================== =============================
    file, model         classifier           backbone           detector or segmentor
    =================== ==================== ================== =============================
    classifier          none                 new: output norms  new: output norms, heads
                                             unused: classifier unused: classifier layers
                                             layers
    backbone            unused: output norms unused: output     new: heads
                                             norms (1)          unused: output norms (1)
    detector, segmentor unused: output       unused: heads,     same kind: unused: output
                        norms, heads         output norms (1)   norms (1); other kind: also
                                                                heads, new and unused
    =================== ==================== ================== =============================

    Detectors of other architectures share what both have: a part of :data:`_DETECTOR_PARTS` of
    which a file has nothing may be new, one of which the model has nothing may be unused, unless
    the model must be complete.

    (1) Of stages that the model does not return. A file with nothing outside its backbone's prefix,
    as written for Detectron2, counts as a backbone.
    """
    state, target = list(state), list(target)
    file, model = model_kind(state), model_kind(target)
    new, unused = set(), {"output norms"}
    if model != "classifier":
        unused.add("classifier layers")
        if file == "classifier":
            new.add("output norms")
    prefix = backbone_prefix(state)
    if file != model or prefix != backbone_prefix(target):
        new.add("heads")
        unused.add("heads")
    elif prefix and all(name.startswith(prefix) for name in state):  # a backbone in disguise
        new.add("heads")
    return new, unused
