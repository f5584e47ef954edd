"""Backbones of timm with the interface of ours, so that comparisons use one recipe."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2.models.image_checks import check_images
from spatial_mamba_d2.models.layers import nchw, nhwc
from spatial_mamba_d2.models.spatial_mamba import BN_POLICIES, STAGES, STRIDES

PREFIX = "timm/"
_COARSEST = max(STRIDES.values())
_PROBE_SIZE = (2 * _COARSEST, 3 * _COARSEST)  # not square, and no input size of a pretrained model


def check_timm_name(name: str, what: str = "name") -> None:
    """Raises ValueError unless ``timm/NAME`` is a model of timm, other than our own ones.

    Args:
        what: the argument or key that ``name`` comes from.
    """
    if not isinstance(name, str):
        raise ValueError(f"{what} must be text, got {name!r}")
    model_name = name.removeprefix(PREFIX)
    if model_name.startswith("spatial_mamba_"):
        raise ValueError(
            f"{what} must be a model of others, got {name!r}: ours is chosen by its variant"
        )
    if not name.startswith(PREFIX) or not timm.is_model(model_name.partition(".")[0]):
        nearest = difflib.get_close_matches(model_name, timm.list_models(), n=1, cutoff=0.0)
        raise ValueError(
            f"{what} must be {PREFIX}NAME with a name of timm.list_models(), got {name!r}; "
            f"the nearest one is {PREFIX}{nearest[0]}"
        )
    try:
        timm.get_pretrained_cfg(model_name)
    except RuntimeError as error:  # no such tag
        raise ValueError(
            f"{what} must be {PREFIX}NAME with a name of timm.list_pretrained(), got {name!r}: "
            f"{error}"
        ) from None


class TimmBackbone(nn.Module):
    """Feature pyramid from a model of timm, as :class:`~.spatial_mamba.SpatialMambaBackbone` is.

    Each level is the last feature map of its stride, with a layer norm of its own, as UPerNet has
    it on Spatial-Mamba, Swin and ConvNeXt. What the levels do not need is removed. Images are
    padded on the right and at the bottom, with zeros, to multiples of 32, and the levels cropped.

    Args:
        name: ``timm/NAME``, with a name of ``timm.list_models()``.
        in_chans: channels of the images.
        drop_path_rate: None for the default of timm's model.
        bn_policy, grad_checkpointing: see :class:`~.spatial_mamba.SpatialMamba`.
        freeze_at: 0, because which parameters belong to a stage is unknown.

    Attributes:
        body: timm's model.
        dims: channels of the levels.
        removed: names of the parameters and buffers that were removed from timm's model.
        first_conv: name in ``body`` of the weight that depends on ``in_chans``, if known.

    Raises:
        ValueError: no such model; or it has no feature maps of strides 4, 8, 16 and 32, not for
            images of any size, or not that option.
    """

    def __init__(
        self,
        name: str,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        bn_policy: str = "train",
        grad_checkpointing: bool = False,
        freeze_at: int = 0,
    ):
        super().__init__()
        check_timm_name(name)
        if bn_policy not in BN_POLICIES:
            raise ValueError(
                f"bn_policy must be one of {', '.join(BN_POLICIES)}, got {bn_policy!r}"
            )
        if freeze_at:
            raise ValueError(f"freeze_at must be 0 for {name}, got {freeze_at}")
        self.name, self.in_chans, self.bn_policy = name, in_chans, bn_policy
        self.body: Any = _create(name, in_chans, drop_path_rate)
        complete = set(self.body.state_dict())
        layer = self.body.pretrained_cfg.get("first_conv")
        self.first_conv = f"{layer}.weight" if isinstance(layer, str) else ""
        self.dims = self._keep_levels()
        self.removed = complete - set(self.body.state_dict())
        self.output_norms = nn.ModuleDict(
            {level: nn.LayerNorm(dim) for level, dim in zip(STAGES, self.dims, strict=True)}
        )
        if grad_checkpointing:
            self._checkpoint_gradients()
        if bn_policy == "sync":
            self.body = convert_sync_batchnorm(self.body)
        for batch_norm in self._fixed_norms():
            batch_norm.eval().requires_grad_(False)

    def _keep_levels(self) -> list[int]:
        """Choose the feature maps, remove what they do not need; returns their channels."""
        self.body.eval()
        x = torch.zeros(1, self.in_chans, *_PROBE_SIZE, requires_grad=True)
        try:
            with torch.enable_grad():
                maps = self.body.forward_intermediates(
                    x, output_fmt="NCHW", intermediates_only=True
                )
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(
                f"{self.name} must take images of any size, here "
                f"{_PROBE_SIZE[0]} x {_PROBE_SIZE[1]}: {reason}"
            ) from None
        sizes = [tuple(level.shape[-2:]) for level in maps]
        needed = [tuple(side // STRIDES[level] for side in _PROBE_SIZE) for level in STAGES]
        if missing := [STRIDES[k] for k, size in zip(STAGES, needed, strict=True)
                       if size not in sizes]:  # fmt: skip
            strides = sorted({_PROBE_SIZE[0] // height for height, _ in sizes})
            raise ValueError(
                f"{self.name} must have feature maps of strides 4, 8, 16 and 32; it has none of "
                f"{', '.join(map(str, missing))}, only of {', '.join(map(str, strides))}"
            )
        self.indices = [len(sizes) - 1 - sizes[::-1].index(size) for size in needed]
        levels = [maps[index] for index in self.indices]
        parameters = [p for p in self.body.parameters() if p.requires_grad]
        total = torch.stack([level.float().sum() for level in levels]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        used = {id(p) for p, g in zip(parameters, gradients, strict=True) if g is not None}
        _remove_unused(self.body, used)
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in used)  # those of modules in use
        self.body.train()
        return [level.shape[1] for level in levels]

    def _checkpoint_gradients(self) -> None:
        try:
            self.body.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise ValueError(
                "grad_checkpointing (MODEL.SPATIAL_MAMBA.GRAD_CHECKPOINTING) must be False for "
                f"{self.name}, which does not support it, got True"
            ) from None

    def _fixed_norms(self) -> Iterator[nn.Module]:
        for module in self.body.modules() if self.bn_policy == "frozen" else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                yield module

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for batch_norm in self._fixed_norms():
            batch_norm.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's model exempts from weight decay."""
        exempt: set[str] = getattr(self.body, "no_weight_decay", set)()
        return {f"body.{name}" for name in exempt}

    def to_own_names(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state of a classifier in its authors' form, in timm's, if timm can convert it."""
        convert = getattr(sys.modules[type(self.body).__module__], "checkpoint_filter_fn", None)
        if convert is None:
            return state
        try:
            return convert(dict(state), self.body)
        except (AttributeError, KeyError, RuntimeError):  # a file of something else
            return state

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``Tensor[B, in_chans, H, W]`` -> ``{"res2": Tensor[B, C, ceil(H/4), ceil(W/4)], ...}``.

        Raises:
            ValueError: ``x`` is not such a tensor.
        """
        check_images(x, self.in_chans, next(self.output_norms.parameters()).dtype)
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % _COARSEST, 0, -height % _COARSEST))
        maps = self.body.forward_intermediates(
            x, indices=self.indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        levels = {}
        for name, level in zip(STAGES, maps, strict=True):
            level = level[..., : -(-height // STRIDES[name]), : -(-width // STRIDES[name])]
            levels[name] = nchw(self.output_norms[name](nhwc(level)))
        return levels


def _create(name: str, in_chans: int, drop_path_rate: float | None) -> Any:
    """timm's model, for images of any size if it has an option for that."""
    model_name = name.removeprefix(PREFIX)
    options: dict[str, Any] = {"in_chans": in_chans, "drop_path_rate": drop_path_rate}
    if getattr(timm.get_pretrained_cfg(model_name), "fixed_input_size", False):
        options["strict_img_size"] = False
    try:
        try:
            model = timm.create_model(model_name, **options)
        except TypeError as error:
            if "'strict_img_size'" not in str(error):
                raise
            del options["strict_img_size"]
            model = timm.create_model(model_name, **options)
    except TypeError as error:
        if "'drop_path_rate'" not in str(error):
            raise
        raise ValueError(
            f"drop_path_rate (MODEL.SPATIAL_MAMBA.DROP_PATH_RATE) must be None for {name}, got "
            f"{drop_path_rate}"
        ) from None
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{name} must have forward_intermediates (timm), which it does not")
    return model


def _remove_unused(module: nn.Module, used: set[int]) -> None:
    """Replace the parts that have parameters, but none of ``used``."""
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and not any(id(p) in used for p in parameters):
            setattr(module, name, nn.Identity())
        else:
            _remove_unused(child, used)
