"""The ImageNet classifier, with everything that users of timm rely on.

Importing this module registers ``spatial_mamba_tiny``, ``_small`` and ``_base`` in timm, so that
``timm.create_model("spatial_mamba_tiny", ...)`` gives what :func:`build_classifier` gives. Equal in
function to ``SpatialMamba`` in ``classification/models/spatialmamba.py`` of the authors.
"""

# No `from __future__ import annotations`: torch.fx and TorchScript read the type of `forward`.

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from spatial_mamba_d2.models.checkpoints.names import is_official, to_ours, translate
from spatial_mamba_d2.models.checkpoints.reading import stand_in
from spatial_mamba_d2.models.layers import nchw
from spatial_mamba_d2.models.spatial_mamba import STAGES, STRIDES, SpatialMamba
from spatial_mamba_d2.models.variants import VARIANTS, variant_kwargs

_OUTPUT_FORMATS = ("NCHW", "NHWC")
_CONFIGURATION = "yacs.config.CfgNode"
# Keys of timm's configuration that locate pretrained weights.
_PRETRAINED_SOURCES = ("file", "state_dict", "url", "hf_hub_id")


class SpatialMambaClassifier(SpatialMamba):
    """Image classifier: ``Tensor[B, in_chans, H, W]`` -> logits ``Tensor[B, num_classes]``.

    ``load_state_dict`` takes the authors' parameter names as well as ours.

    Args:
        num_classes: 0 for none: the model then returns pooled features.
        global_pool: timm's name of the pooling over H and W: ``"avg"``, ``"max"``, ``"avgmax"``,
            ``"catavgmax"``, or ``""`` for none.
        drop_rate: dropout in front of the last layer.
        **kwargs: see :class:`SpatialMamba`.

    Raises:
        ValueError: an argument is out of its range.
    """

    output_fmt = "NHWC"  # layout of forward_features, in timm's terms
    global_pool: nn.Module
    head: nn.Module

    def __init__(
        self,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_features = self.dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": STRIDES[name], "module": f"stages.{i}.blocks"}
            for i, (name, dim) in enumerate(zip(STAGES, self.dims, strict=True))
        ]
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.register_load_state_dict_pre_hook(_rename_official_keys)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for ``num_classes``; ``global_pool`` stays if it is None.

        It has the device, dtype and mode of the rest.

        Raises:
            ValueError: ``num_classes`` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        pool_type: Any = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        pool: Any
        pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type, input_fmt="NHWC"
        )
        self.global_pool = pool
        self.head_hidden_size = self.num_features * pool.feat_mult()
        self._init_weights(self.head)
        like = next(self.parameters())
        for module in (self.global_pool, self.head):
            module.to(like.device, like.dtype).train(self.training)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """``Tensor[B, in_chans, H, W]`` -> ``Tensor[B, ceil(H/32), ceil(W/32), C]``, normalised."""
        return self.norm(self.forward_stages(x)[STAGES[len(self.stages) - 1]])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and, unless ``pre_logits``, the last layer."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of stages, before downsampling.

        Args:
            x: ``Tensor[B, in_chans, H, W]``.
            indices: of the stages; a number means that many last ones, None all.
            norm: also apply the final norm, to the last stage only.
            stop_early: skip the stages behind the last of ``indices``.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: leave out the first part of the result.

        Returns:
            Output of the last stage that ran (normalised if it is the model's last one),
            ``Tensor[B, h, w, C]``, and the chosen outputs.

        Raises:
            ValueError: no such format.
        """
        if output_fmt not in _OUTPUT_FORMATS:
            raise ValueError(
                f"output_fmt must be one of {', '.join(_OUTPUT_FORMATS)}, got {output_fmt!r}"
            )
        taken, last = feature_take_indices(len(self.stages), indices)
        end = last if stop_early else len(self.stages) - 1
        outputs = list(self.forward_stages(x, last=STAGES[end]).values())
        final = self.norm(outputs[-1]) if end == len(STAGES) - 1 else outputs[-1]
        if norm:
            outputs[-1] = final
        chosen = [outputs[index] for index in sorted(taken)]
        if output_fmt == "NCHW":
            chosen = [nchw(output) for output in chosen]
        return chosen if intermediates_only else (final, chosen)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the outputs ``indices`` do not need; returns them as positive indices."""
        taken, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.drop_stages(last)
        if cut:
            self.num_features = self.dims[last]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters into layers; ``coarse``: one per stage."""
        stages = r"^stages\.(\d+)"
        previous = (99999,)  # in timm: joins the group before it
        fine = [
            (rf"{stages}\.blocks\.(\d+)", None),
            (rf"{stages}\.downsample", previous),
            (r"^norm", previous),
        ]
        return {"stem": r"^stem", "blocks": stages if coarse else fine}

    def no_weight_decay(self) -> set[str]:
        """None by name: the official recipe exempts biases and one-dimensional parameters."""
        return set()


def _rename_official_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    names = [name for name in state_dict if name.startswith(prefix)]
    if is_official(name.removeprefix(prefix) for name in names):
        for name in names:
            ours = prefix + to_ours(name.removeprefix(prefix))
            state_dict[ours] = state_dict.pop(name)


def build_classifier(
    variant: str, num_classes: int = 1000, **overrides: Any
) -> SpatialMambaClassifier:
    """The classifier ``"tiny"``, ``"small"`` or ``"base"``.

    Args:
        num_classes: see :class:`SpatialMambaClassifier`.
        overrides: arguments of :class:`SpatialMambaClassifier` that replace the variant's.

    Raises:
        ValueError: no such variant, or an argument out of its range.
    """
    return SpatialMambaClassifier(num_classes=num_classes, **variant_kwargs(variant, overrides))


# Test time settings of the official evaluation: short side 256, centre crop 224.
_DEFAULT_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.conv1.conv",
    "classifier": "head",
    "license": "apache-2.0",
    "paper_ids": "arXiv:2410.15091",
    "paper_name": "Spatial-Mamba: Effective Visual State Space Models via Structure-aware State "
    "Fusion",
    "origin_url": "https://github.com/EdwardChasel/Spatial-Mamba",
}
default_cfgs = generate_default_cfgs(
    {f"spatial_mamba_{variant}.untrained": _DEFAULT_CFG for variant in VARIANTS}
)


def _translate_pretrained(state: Mapping[str, Tensor], model: SpatialMambaClassifier) -> Any:
    """A pretrained state dict under our names, without what ``model`` does not have."""
    translated = translate(state)
    unused = ("output_norms.", *(() if model.num_classes else ("head.",)))
    return {name: value for name, value in translated.items() if not name.startswith(unused)}


def _create(
    variant: str,
    pretrained: bool,
    device: torch.types.Device = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    name = f"spatial_mamba_{variant}"
    strides = list(STRIDES.values())
    if (output_stride := kwargs.pop("output_stride", strides[-1])) != strides[-1]:
        raise ValueError(
            f"output_stride must be {strides[-1]} for {name}, got {output_stride}: scan and state "
            f"fusion have no dilated form; take a head for maps of stride {str(strides)[1:-1]}"
        )
    # The authors' checkpoints hold their configuration. timm reads files by weights_only loading,
    # now or (checkpoint_path) after this returns, which knows no such class, and could not fill it
    # if it did; so no other file loads differently because of this process-wide setting.
    torch.serialization.add_safe_globals([(stand_in(_CONFIGURATION), _CONFIGURATION)])
    if pretrained:
        overlay = kwargs.get("pretrained_cfg_overlay")
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay).to_dict()
        if not any(cfg.get(source) for source in _PRETRAINED_SOURCES):
            raise ValueError(
                f"pretrained must be False for {name}, or come with a file: the authors' "
                f"checkpoints lie on Google Drive, linked from {_DEFAULT_CFG['origin_url']}; "
                "give yours as checkpoint_path=FILE, or with features_only or other num_classes "
                "as pretrained=True, pretrained_cfg_overlay=dict(file=FILE)"
            )
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            SpatialMambaClassifier,
            name,
            pretrained,
            pretrained_filter_fn=_translate_pretrained,
            feature_cfg={"out_indices": tuple(range(len(STAGES))), "feature_cls": "getter"},
            **variant_kwargs(variant, kwargs),
        )
    return model.to(dtype=dtype)


@register_model
def spatial_mamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("tiny", pretrained, **kwargs)


@register_model
def spatial_mamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("small", pretrained, **kwargs)


@register_model
def spatial_mamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("base", pretrained, **kwargs)
