"""Spatial-Mamba

Paper: `Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion`
    - https://arxiv.org/abs/2410.15091

Code and weights: https://github.com/EdwardChasel/Spatial-Mamba

A state space model scans the image once, in raster order, and then fuses each hidden state with
its neighbours by dilated depthwise convolutions. Everything is plain PyTorch: the scan advances all
rows of the image together, and hands the state at the end of a row to the next one.

This is the model as `timm.models` would have it, in one file. It computes the same as
`spatial_mamba_d2.models.build_classifier`, whose operators are faster and take less memory.
"""

import math
import re
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    DropPath,
    LayerNorm,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)

# Inside timm: from ._builder import build_model_with_cfg, and so on.
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
)
from timm.models._features import feature_take_indices
from torch import nn

__all__ = ["SpatialMamba"]

DILATIONS = (1, 3, 5)


def linear_recurrence(
    decay: torch.Tensor, drive: torch.Tensor, dim: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Solve `h_t = decay_t * h_{t-1} + drive_t` along `dim`, from a state of zero.

    Products of decays may become 0, and that is right; cumulative sums, which divide by them, would
    give NaN.

    Returns:
        The states, and the product of all decays up to each step.
    """
    decays, drives = decay.unbind(dim), drive.unbind(dim)
    states, products = [drives[0]], [decays[0]]
    for t in range(1, len(drives)):
        states.append(drives[t] + decays[t] * states[t - 1])
        products.append(decays[t] * products[t - 1])
    return torch.stack(states, dim), torch.stack(products, dim)


@register_notrace_function  # reason: the number of steps depends on the size of the image
def selective_scan(
    u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    """Hidden states of a state space model that reads the image in raster order.

    `h_t = exp(dt_t * A) * h_{t-1} + dt_t * B_t * u_t`

    Args:
        u: Input [B, H, W, D].
        dt: Step sizes [B, H, W, D].
        A: State matrix, negative [D].
        B: Input matrix [B, H, W, 1].
    """
    h, decay = linear_recurrence(torch.exp(dt * A), dt * B * u, dim=2)  # each row on its own
    row_end, _ = linear_recurrence(decay[:, :, -1], h[:, :, -1], dim=1)  # [B, H, D]
    row_start = F.pad(row_end[:, :-1], (0, 0, 1, 0))
    return h + decay * row_start.unsqueeze(2)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise 3x3 convolution of a channels-last map [B, H, W, C]."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias)
        return x.permute(0, 2, 3, 1)


class StateFusion(nn.Module):
    """Structure-aware state fusion: a weighted sum of dilated depthwise convolutions."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.kernel_d1 = nn.Parameter(torch.ones(dim, 1, 3, 3, **dd))
        self.kernel_d3 = nn.Parameter(torch.ones(dim, 1, 3, 3, **dd))
        self.kernel_d5 = nn.Parameter(torch.ones(dim, 1, 3, 3, **dd))
        self.alpha = nn.Parameter(torch.ones(len(DILATIONS), **dd))

    def _fuse(self, h: torch.Tensor, kernel: torch.Tensor, dilation: int) -> torch.Tensor:
        h = F.pad(h, [dilation] * 4, mode="replicate")
        return F.conv2d(h, kernel.to(h.dtype), dilation=dilation, groups=self.dim)

    def forward(self, h: torch.Tensor) -> torch.Tensor:  # [B, H, W, D]
        h = h.permute(0, 3, 1, 2)
        h = (
            self._fuse(h, self.alpha[0] * self.kernel_d1, 1)
            + self._fuse(h, self.alpha[1] * self.kernel_d3, 3)
            + self._fuse(h, self.alpha[2] * self.kernel_d5, 5)
        )
        return h.permute(0, 2, 3, 1)


class StructureAwareSSM(nn.Module):
    """Gated state space model with one state per channel, whose states are fused."""

    def __init__(
        self,
        dim: int,
        expand_ratio: float = 2.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim_inner = int(expand_ratio * dim)
        self.dt_rank = math.ceil(dim / 16)
        self.dt_init = (dt_min, dt_max, dt_init_floor)

        self.in_proj = nn.Linear(dim, 2 * self.dim_inner, bias=False, **dd)
        self.conv = DepthwiseConv2d(self.dim_inner, **dd)
        self.act = nn.SiLU()
        self.x_proj = nn.Linear(self.dim_inner, self.dt_rank + 2, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, self.dim_inner, **dd)
        self.A_log = nn.Parameter(torch.zeros(self.dim_inner, 1, **dd))
        self.D = nn.Parameter(torch.ones(self.dim_inner, **dd))
        self.fusion = StateFusion(self.dim_inner, **dd)
        self.out_norm = LayerNorm(self.dim_inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(self.dim_inner, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        dt_min, dt_max, dt_init_floor = self.dt_init
        nn.init.kaiming_uniform_(self.x_proj.weight, a=math.sqrt(5))
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        dt = dt.clamp(min=dt_init_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, H, W, C]
        u, z = self.in_proj(x).chunk(2, dim=-1)  # [B, H, W, D]
        u = self.act(self.conv(u))
        dt, B, C = self.x_proj(u).split([self.dt_rank, 1, 1], dim=-1)
        dt = F.softplus(self.dt_proj(dt).float())
        A = -torch.exp(self.A_log.float().squeeze(1))
        h = self.fusion(selective_scan(u.float(), dt, A, B.float()))
        y = h * C.float() + u.float() * self.D.float()
        y = y.to(x.dtype)
        return self.out_proj(self.out_norm(y) * self.act(z))


class SpatialMambaBlock(nn.Module):
    """Position encoding, SSM, position encoding and MLP, each with a residual connection."""

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = DepthwiseConv2d(dim, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.ssm = StructureAwareSSM(dim, expand_ratio=ssm_ratio, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = DepthwiseConv2d(dim, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, H, W, C]
        x = x + self.cpe1(x)
        x = x + self.drop_path1(self.ssm(self.norm1(x)))
        x = x + self.cpe2(x)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class Stem(nn.Module):
    """Image [B, C, H, W] to channels-last map [B, H / 4, W / 4, dim]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = ConvNormAct(in_chans, dim // 2, 3, stride=2, **dd)
        self.conv2 = nn.Sequential(
            ConvNormAct(dim // 2, dim // 2, 3, **dd),
            ConvNormAct(dim // 2, dim // 2, 3, apply_act=False, **dd),
        )
        self.conv3 = nn.Sequential(
            ConvNormAct(dim // 2, dim * 4, 3, stride=2, **dd),
            ConvNormAct(dim * 4, dim, 1, apply_act=False, **dd),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.conv3(x + self.conv2(x))
        return x.permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Inverted bottleneck of stride 2, on a channels-last map."""

    def __init__(self, dim: int, dim_out: int, expand_ratio: int = 8, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = expand_ratio * dim
        self.conv1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, groups=hidden, **dd)
        self.act2 = nn.ReLU()
        self.conv3 = ConvNormAct(hidden, dim_out, 1, bias=True, apply_act=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.conv1(x.permute(0, 3, 1, 2)))
        x = self.conv3(self.act2(self.conv2(x)))
        return x.permute(0, 2, 3, 1)


class SpatialMambaStage(nn.Module):
    def __init__(
        self,
        dim: int,
        dim_out: int,
        depth: int,
        downsample: bool,
        drop_path: List[float],
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.downsample = Downsample(dim, dim_out, **dd) if downsample else nn.Identity()
        self.blocks = nn.Sequential(
            *[
                SpatialMambaBlock(dim_out, ssm_ratio, mlp_ratio, drop_path=drop_path[i], **dd)
                for i in range(depth)
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class SpatialMamba(nn.Module):
    """Spatial-Mamba

    Args:
        in_chans: Number of input image channels.
        num_classes: Number of classifier output classes.
        global_pool: Global pooling type, '' to return unpooled features.
        embed_dim: Width of the first stage, doubled in each further one.
        depths: Number of blocks in each stage.
        ssm_ratio: Expansion ratio of the SSM.
        mlp_ratio: Expansion ratio of the MLP.
        drop_rate: Classifier dropout rate.
        drop_path_rate: Stochastic depth rate of the last block.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Tuple[int, ...] = (2, 4, 8, 4),
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.output_fmt = "NHWC"
        self.feature_info = []

        self.stem = Stem(in_chans, embed_dim, **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, sum(depths))
        stages = []
        dim = embed_dim
        for i, depth in enumerate(depths):
            dim_out = embed_dim * 2**i
            start = sum(depths[:i])
            stages.append(
                SpatialMambaStage(
                    dim,
                    dim_out,
                    depth,
                    downsample=i > 0,
                    drop_path=drop_paths[start : start + depth],
                    ssm_ratio=ssm_ratio,
                    mlp_ratio=mlp_ratio,
                    **dd,
                )
            )
            dim = dim_out
            self.feature_info += [dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}")]
        self.stages = nn.Sequential(*stages)
        self.num_features = dim
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.head = ClassifierHead(
            dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        self.head_hidden_size = self.head.num_features
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, StructureAwareSSM):  # after its children
            m.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()  # nothing besides what has one dimension

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Input image tensor.
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Apply the final norm to the output of the last stage.
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs.
            intermediates_only: Only return intermediate features.

        Returns:
            List of intermediate features or tuple of (final features, intermediates).
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW or NHWC."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1

        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice stages in torchscript
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                y = self.norm(x) if norm and i == last else x
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        if torch.jit.is_scripting() or not stop_early or max_index == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            # features now end at the last kept stage, the head is sized for the final features
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.head.in_features = self.num_features
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


# Names in the original repository, applied in this order.
_RENAMED = (
    (r"^patch_embed\.", "stem."),
    (r"^(stem\..*)\.norm\.", r"\1.bn."),
    (r"^layers\.", "stages."),
    (r"\.downsample\.conv\.0\.conv\.", ".downsample.conv1."),
    (r"\.downsample\.conv\.1\.conv\.", ".downsample.conv2."),
    (r"\.downsample\.conv\.2\.norm\.", ".downsample.conv3.bn."),
    (r"\.downsample\.conv\.2\.", ".downsample.conv3."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.", ".ssm."),
    (r"\.ssm\.conv2d\.", ".ssm.conv."),
    (r"\.ssm\.x_proj_weight$", ".ssm.x_proj.weight"),
    (r"\.ssm\.dt_projs_(weight|bias)$", r".ssm.dt_proj.\1"),
    (r"\.ssm\.A_logs$", ".ssm.A_log"),
    (r"\.ssm\.Ds$", ".ssm.D"),
    (r"\.state_fusion\.kernel_3$", ".fusion.kernel_d1"),
    (r"\.state_fusion\.kernel_3_1$", ".fusion.kernel_d3"),
    (r"\.state_fusion\.kernel_3_2$", ".fusion.kernel_d5"),
    (r"\.state_fusion\.alpha$", ".fusion.alpha"),
    (r"^head\.", "head.fc."),
)


def checkpoint_filter_fn(
    state_dict: Dict[str, torch.Tensor], model: nn.Module
) -> Dict[str, torch.Tensor]:
    """Remap checkpoints of the original repository."""
    state_dict = state_dict.get("model", state_dict)
    if "patch_embed.conv1.conv.weight" not in state_dict:
        return state_dict
    out_dict = {}
    for k, v in state_dict.items():
        for pattern, replacement in _RENAMED:
            k = re.sub(pattern, replacement, k)
        # downsampling starts the next stage here, and ends a stage there
        k = re.sub(r"^stages\.(\d+)\.downsample", _next_stage, k)
        out_dict[k] = v
    return out_dict


def _next_stage(match: "re.Match[str]") -> str:
    return f"stages.{int(match[1]) + 1}.downsample"


def _cfg(url: str = "", **kwargs: Any) -> Dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2410.15091",
        "origin_url": "https://github.com/EdwardChasel/Spatial-Mamba",
        **kwargs,
    }


# The released weights are on Google Drive; timm would host them (hf_hub_id="timm/").
default_cfgs = generate_default_cfgs(
    {
        "spatialmamba_tiny.in1k": _cfg(),
        "spatialmamba_small.in1k": _cfg(),
        "spatialmamba_base.in1k": _cfg(),
    }
)


def _create_spatialmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    return build_model_with_cfg(
        SpatialMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def spatialmamba_tiny(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-T: 27M params, 83.5 top-1."""
    model_args = dict(embed_dim=64, depths=(2, 4, 8, 4))
    return _create_spatialmamba("spatialmamba_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def spatialmamba_small(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-S: 43M params, 84.6 top-1."""
    model_args = dict(embed_dim=64, depths=(2, 4, 21, 5))
    return _create_spatialmamba("spatialmamba_small", pretrained, **dict(model_args, **kwargs))


@register_model
def spatialmamba_base(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-B: 96M params, 85.3 top-1."""
    model_args = dict(embed_dim=96, depths=(2, 4, 21, 5))
    return _create_spatialmamba("spatialmamba_base", pretrained, **dict(model_args, **kwargs))
