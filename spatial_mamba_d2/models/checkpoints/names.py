"""Names of parameters: the authors' and ours, in bijection, and what a set of names belongs to.

One table leads from the official names to ours, and is inverted mechanically, so that every
checkpoint can go either way.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from spatial_mamba_d2.models.checkpoints.reading import WeightsError

StateDict = dict[str, Tensor]

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
#: Prefixes of our names for everything in the authors' Mask R-CNN outside its backbone.
MASK_RCNN_HEADS = tuple(ours for _, ours in _MASK_RCNN_NAMES)
_OFFICIAL_BACKBONE_PREFIX = "backbone."
DETECTOR_BACKBONE_PREFIX = "backbone.bottom_up."
SEGMENTOR_BACKBONE_PREFIX = "backbone."
# What PyTorch's wrappers put anywhere into names, and trainers in front of them.
_WRAPPER_PARTS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_OWNER = r"(?:model|net|network|encoder)\."
_STEM = r"(?:backbone\.(?:bottom_up\.)?)?(?:stem|patch_embed)\."
_FIRST_LAYER = rf"{_STEM}(?:_\w+\.)*conv1\.conv\."  # other models have a stem, too
_SEGMENTOR_MARK = "decode_head."  # prefix of names that only a segmentor has, theirs and ours


def _invert(pattern: str, replacement: str) -> tuple[str, str]:
    """The row that undoes ``(pattern, replacement)``, two literals with optional anchors."""
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


def is_official(names: Iterable[str]) -> bool:
    """Whether a model with these parameters has the authors' names."""
    return any(re.match(r"(backbone\.)?patch_embed\.", name) for name in names)


def strip_wrappers(names: Iterable[str], source: str = "checkpoint") -> dict[str, str]:
    """``{name: name without what trainers put around it}``.

    ``module.`` and its like are removed anywhere, and ``model.``, ``net.`` or ``encoder.`` in front
    of the Spatial-Mamba, in any number. Names outside of it stay.

    Raises:
        WeightsError: this is ambiguous, because several models are in ``names``.
    """
    stripped = {name: _WRAPPER_PARTS.sub("", name) for name in names}
    found = (re.match(rf"((?:{_OWNER})*){_STEM}", name) for name in stripped.values())
    owners = {match[1] for match in found if match}
    if len(owners) == 1:
        (owner,) = owners
        stripped = {name: rest.removeprefix(owner) for name, rest in stripped.items()}
    if len(owners) > 1 or len(set(stripped.values())) < len(stripped):
        several = ", ".join(repr(owner) for owner in sorted(owners))
        raise WeightsError(
            f"weights: {source} holds several Spatial-Mamba models, under {several}; give one of "
            "them, as a dictionary"
        )
    return stripped


def strip_owner(
    names: Iterable[str], known: Iterable[str], source: str = "checkpoint"
) -> dict[str, str]:
    """``{name: name without what trainers put around it}``, for models of others.

    ``module.`` and its like are removed anywhere, and ``model.`` and its like in front of all
    names, unless a name without them begins with one of ``known``.

    Raises:
        WeightsError: two names become one.
    """
    stripped = {name: _WRAPPER_PARTS.sub("", name) for name in names}
    owners = {
        match[0] if (match := re.match(rf"(?:{_OWNER})+", n)) else "" for n in stripped.values()
    }
    if len(owners) == 1 and not any(n.startswith(tuple(known)) for n in stripped.values()):
        (owner,) = owners
        stripped = {name: rest.removeprefix(owner) for name, rest in stripped.items()}
    if len(set(stripped.values())) < len(stripped):
        name, times = Counter(stripped.values()).most_common(1)[0]
        raise WeightsError(f"weights: {source} holds {name} {times} times, in wrappers of trainers")
    return stripped


def enclosing_prefix(names: Iterable[str]) -> str:
    """What precedes the names of the one Spatial-Mamba model inside another module."""
    found = (re.match(rf"(.*?){_FIRST_LAYER}", name) for name in names)
    prefixes = {match[1] for match in found if match}
    return prefixes.pop() if len(prefixes) == 1 else ""


def translate(state: Mapping[str, Tensor], source: str = "checkpoint") -> StateDict:
    """``state`` under our names; whose names it has is recognised by its keys.

    Raises:
        WeightsError: neither an official Spatial-Mamba checkpoint nor one of ours, or several.
    """
    stripped = strip_wrappers(state, source)
    state = {stripped[name]: value for name, value in state.items()}
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


def backbone_prefix(names: Iterable[str]) -> str:
    """The prefix of the backbone's parameters; empty for a classifier or a bare backbone."""
    prefixes = (DETECTOR_BACKBONE_PREFIX, SEGMENTOR_BACKBONE_PREFIX)
    stems = [prefix for prefix in prefixes if any(n.startswith(f"{prefix}stem.") for n in names)]
    return stems[0] if stems else ""


def model_kind(names: Iterable[str]) -> str:
    """``"classifier"``, ``"backbone"``, ``"detector"`` or ``"segmentor"``, from our names."""
    names = list(names)
    if any(name.startswith(_SEGMENTOR_MARK) for name in names):
        return "segmentor"
    if backbone_prefix(names):
        return "detector"
    return "classifier" if "head.weight" in names else "backbone"
