"""Spatial-Mamba: one raster scan per block, then fusion of each state with its neighbours.

Xiao et al., "Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion",
arXiv 2410.15091. Computes the same as ``classification/models/spatialmamba.py`` of the authors'
repository (EdwardChasel/Spatial-Mamba), whose parameter names :mod:`.checkpoints.names` translates.

Activations are channels-last ``[B, H, W, C]`` from the stem to the outputs. Symbols as in the
paper; C is the width of a stage, D = ``ssm_ratio`` C the width inside the SSM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spatial_mamba_d2.models.image_checks import check_images
from spatial_mamba_d2.models.layers import (
    ConvLayer,
    DepthwiseConv,
    ExpandingConv,
    GatedLayerNorm,
    HalvingConv,
    LayerNorm,
    PointwiseConv,
    StochasticDepth,
    nchw,
    nhwc,
)
from spatial_mamba_d2.models.plain_layers import is_plain
from spatial_mamba_d2.models.pointwise import Mlp, Pointwise
from spatial_mamba_d2.models.recompute import (
    as_under_autocast,
    hooks_are_possible,
    keeps_recipes,
    recompute,
)
from spatial_mamba_d2.models.scripting import scriptable_graph
from spatial_mamba_d2.models.variants import variant_kwargs
from spatial_mamba_d2.ops import merge_taps, structure_aware_ssm, structure_aware_ssm_from_dt
from spatial_mamba_d2.ops.cuda.kernels import run_on

# These look at shapes, which are unknown while torch.fx traces, so they become nodes of its graph.
torch.fx.wrap("check_images")
torch.fx.wrap("merge_taps")
torch.fx.wrap("structure_aware_ssm")

STAGES = ("res2", "res3", "res4", "res5")
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
BN_POLICIES = ("train", "frozen", "sync")


class Stem(nn.Module):
    """``Tensor[B, 3, H, W]`` -> ``Tensor[B, ceil(H/4), ceil(W/4), C]``."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = ConvLayer(in_chans, dim // 2, 3, stride=2)
        self.conv2 = nn.Sequential(
            ConvLayer(dim // 2, dim // 2, 3), ConvLayer(dim // 2, dim // 2, 3, act=False)
        )
        self.conv3 = nn.Sequential(
            ConvLayer(dim // 2, dim * 4, 3, stride=2),
            ConvLayer(dim * 4, dim, 1, act=False, conv=PointwiseConv),
        )

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its images; None if a foreign layer without a weight takes them."""
        weight = getattr(self.conv1.conv, "weight", None)
        return weight.dtype if isinstance(weight, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(nchw(nhwc(x).contiguous()))  # channels_last
        return nhwc(self.conv3(x + self.conv2(x)))


class Downsample(nn.Module):
    """Inverted bottleneck: ``Tensor[B, H, W, C]`` -> ``Tensor[B, ceil(H/2), ceil(W/2), 2C]``."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = 8 * dim
        bare: dict[str, Any] = {"norm": False, "act": False, "bias": True}  # ReLUs: HalvingConv
        self.expand = ConvLayer(dim, hidden, 1, conv=ExpandingConv, **bare)
        self.reduce = ConvLayer(
            hidden, hidden, 3, stride=2, groups=hidden, conv=HalvingConv, **bare
        )
        self.project = ConvLayer(hidden, 2 * dim, 1, bias=True, act=False, conv=PointwiseConv)

    @keeps_recipes
    def forward(self, x: Tensor) -> Tensor:
        return nhwc(self.project(self.reduce(self.expand(nchw(x)))))


class StateFusion(nn.Module):
    """Weights of structure-aware state fusion; ``forward()`` returns them as ``Tensor[25, D]``."""

    def __init__(self, dim: int):
        super().__init__()
        self.kernel_d1 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.kernel_d3 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.kernel_d5 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.alpha = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return merge_taps(self.kernel_d1, self.kernel_d3, self.kernel_d5, self.alpha)


class StructureAwareSSM(nn.Module):
    """Gated structure-aware state space model, ``Tensor[B, H, W, C]`` -> the same shape.

    Paper, section 3.3 and figure 4; ``StructureAwareSSM`` in the authors' code, with one state per
    channel. A, D and the bias of delta stay float32 under autocast.

    Args:
        dim: C.
        ssm_ratio: D / C.
        dt_min, dt_max: range of the initial values of delta.
        dt_floor: lower bound of the initial values of delta.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 2.0,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_floor: float = 1e-4,
    ):
        super().__init__()
        inner = int(ssm_ratio * dim)
        rank = math.ceil(dim / 16)
        self.split_sizes = (rank, 1, 1)
        self.in_proj = Pointwise(dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv(inner, residual=False)
        self.x_proj = Pointwise(inner, sum(self.split_sizes), bias=False)
        self.dt_proj = Pointwise(rank, inner, bias=False, recompute_output=True)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.zeros(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.fusion = StateFusion(inner)
        self.out_norm = GatedLayerNorm(inner)
        self.out_proj = Pointwise(inner, dim, bias=False)
        self.dt_range = (dt_min, dt_max, dt_floor)
        self.reset_dt_parameters()

    @torch.no_grad()
    def reset_dt_parameters(self) -> None:
        """Initialise ``x_proj``, ``dt_proj`` and ``dt_bias``: delta log-uniform in its range."""
        dt_min, dt_max, dt_floor = self.dt_range
        nn.init.kaiming_uniform_(self.x_proj.weight, a=math.sqrt(5))
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_()
        dt.clamp_(min=dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # [B, H, W, D] each
        u = self.conv(u)
        dt, B, C = self.x_proj(u).split(self.split_sizes, dim=-1)
        A = -torch.exp(self.A_log.float().flatten())
        others = (A, B.squeeze(-1), C.squeeze(-1), self.D, self.dt_bias, self.fusion())
        # The slowest part of a block on a GPU, where there is more memory for the time of training.
        layer, on_gpu = self.dt_proj, run_on(u)
        if on_gpu and is_plain(layer, Pointwise) and layer.bias is None:
            factors = as_under_autocast(dt, layer.weight)
            y = structure_aware_ssm_from_dt(u, *factors, *others)  # delta is never in memory
        else:
            inputs = (u, layer(dt), *others)
            y = structure_aware_ssm(*inputs) if on_gpu else recompute(structure_aware_ssm, *inputs)
        return self.out_proj(self.out_norm(y, z))


class Block(nn.Module):
    """Position encoding, SSM, position encoding, MLP, each with a residual connection.

    ``Tensor[B, H, W, C]`` -> the same shape. Training keeps the inputs and outputs of the large
    matrix products and the middle of the residual stream, 10 C values per token; on a GPU also the
    output of the SSM, 2 C.
    """

    def __init__(self, dim: int, ssm_ratio: float, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.cpe1 = DepthwiseConv(dim, residual=True)
        self.ln1 = LayerNorm(dim)
        self.ssm = StructureAwareSSM(dim, ssm_ratio)
        self.cpe2 = DepthwiseConv(dim, residual=True)
        self.ln2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path1 = StochasticDepth(drop_path)
        self.drop_path2 = StochasticDepth(drop_path)

    @keeps_recipes
    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.drop_path1(self.ssm(self.ln1(x)), x)
        x = self.cpe2(x)
        return self.drop_path2(self.mlp(self.ln2(x)), x)


class Blocks(nn.Sequential):
    """The blocks of a stage, ``Tensor[B, H, W, C]`` -> the same shape."""

    def forward(self, x: Tensor, grad_checkpointing: bool = False) -> Tensor:
        for block in self:
            if grad_checkpointing and torch.is_grad_enabled() and hooks_are_possible():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Stage(nn.Module):
    """Blocks of one width; ``downsample`` leads to the next stage and is None in the last one."""

    def __init__(self, blocks: list[Block], downsample: Downsample | None):
        super().__init__()
        self.blocks = Blocks(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, grad_checkpointing: bool = False) -> Tensor:
        """``Tensor[B, H, W, C]`` -> the same shape, before downsampling."""
        return self.blocks(x, grad_checkpointing)


class SpatialMamba(nn.Module):
    """Stem and four stages, which the backbone and the classifier have in common.

    Args:
        embed_dim: width of the first stage; each following stage doubles it.
        depths: number of blocks in each stage.
        drop_path_rate: drop rate of the last block; rates grow linearly from 0 over all blocks.
        in_chans: number of channels of the image.
        ssm_ratio: width inside the SSM over the width of the stage.
        mlp_ratio: width inside the MLP over the width of the stage.
        bn_policy: ``"train"``: batch norm as usual; ``"frozen"``: running statistics and no
            gradients for its weights, also in ``train()``; ``"sync"``: statistics of all processes.
        grad_checkpointing: recompute each block in the backward pass instead of keeping its
            activations. Its forward hooks then fire again in backward.
        freeze_at: what gets no gradients and runs with fixed batch-norm statistics: 0 nothing,
            1 the stem, 2..5 the stem and the stages up to ``res{freeze_at}``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        ssm_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        bn_policy: str = "train",
        grad_checkpointing: bool = False,
        freeze_at: int = 0,
    ):
        super().__init__()
        if len(depths) != len(STAGES) or min(depths) < 1:
            raise ValueError(f"depths must be four positive numbers, got {tuple(depths)}")
        if bn_policy not in BN_POLICIES:
            raise ValueError(
                f"bn_policy must be one of {', '.join(BN_POLICIES)}, got {bn_policy!r}"
            )
        if not 0 <= freeze_at <= 5:
            raise ValueError(f"freeze_at must be 0..5, got {freeze_at}")
        self.dims = [embed_dim * 2**i for i in range(len(STAGES))]
        self.in_chans = in_chans
        self.grad_checkpointing = grad_checkpointing
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stem = Stem(in_chans, embed_dim)
        self.stages = nn.ModuleList(
            Stage(
                [Block(dim, ssm_ratio, mlp_ratio, next(rates)) for _ in range(depth)],
                Downsample(dim) if dim != self.dims[-1] else None,
            )
            for dim, depth in zip(self.dims, depths, strict=True)
        )
        self.apply(self._init_weights)
        self.bn_policy, self.freeze_at = bn_policy, freeze_at
        for part in self._frozen_parts():
            part.requires_grad_(False)
        if bn_policy == "sync":
            nn.SyncBatchNorm.convert_sync_batchnorm(self)
        for norm in self._fixed_norms():
            norm.eval().requires_grad_(False)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, StructureAwareSSM):
            module.reset_dt_parameters()
        elif isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def drop_stages(self, last: int) -> None:
        """Keep the stages up to the index ``last``, without what leads to the next one."""
        self.stages = self.stages[: last + 1]
        self.stages[-1].downsample = None  # type: ignore[assignment]  # ModuleList hides it

    def _frozen_parts(self) -> list[nn.Module]:
        return [self.stem, *self.stages][: self.freeze_at]

    def _fixed_norms(self) -> Iterator[nn.Module]:
        """The batch norms with fixed statistics, found anew because tools replace them."""
        parts = [self] if self.bn_policy == "frozen" else self._frozen_parts()
        for part in parts:
            for module in part.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    yield module

    __prepare_scriptable__ = scriptable_graph

    def train(self, mode: bool = True) -> SpatialMamba:
        super().train(mode)
        for norm in self._fixed_norms():
            norm.eval()
        return self

    def forward_stages(self, x: Tensor, last: str = STAGES[-1]) -> dict[str, Tensor]:
        """Outputs of the stages up to ``last``, before downsampling.

        Args:
            x: images, ``Tensor[B, in_chans, H, W]`` with any H, W >= 1.

        Returns:
            ``{"res2": Tensor[B, ceil(H/4), ceil(W/4), C], ..., last: ...}``.

        Raises:
            ValueError: ``x`` is not such a tensor.
        """
        check_images(x, self.in_chans, self.stem.dtype)
        x = self.stem(x)
        outputs = {}
        for name, stage in zip(STAGES, self.stages, strict=False):
            x = outputs[name] = stage(x, self.grad_checkpointing)
            if name == last or stage.downsample is None:
                break
            x = stage.downsample(x)  # type: ignore[operator]  # ModuleList hides the type
        return outputs


class SpatialMambaBackbone(SpatialMamba):
    """Feature pyramid for detection and segmentation; ``Backbone_SpatialMamba`` of the authors.

    Args:
        out_features: which of ``res2 .. res5`` to return; each has its own layer norm. Later stages
            do not exist.
        **kwargs: see :class:`SpatialMamba`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, out_features: Sequence[str] = STAGES, **kwargs: Any):
        super().__init__(**kwargs)
        unknown = sorted(set(out_features) - set(STAGES))
        if unknown or not out_features:
            raise ValueError(
                f"out_features must be some of {', '.join(STAGES)}, got {list(out_features)}"
            )
        self.out_features = tuple(name for name in STAGES if name in out_features)
        self.drop_stages(STAGES.index(self.out_features[-1]))
        self.output_norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(dim)
                for name, dim in zip(STAGES, self.dims, strict=True)
                if name in self.out_features
            }
        )

    def output_shape(self) -> dict[str, tuple[int, int]]:
        """``{name: (channels, stride)}`` of :meth:`forward`."""
        dims = dict(zip(STAGES, self.dims, strict=True))
        return {name: (dims[name], STRIDES[name]) for name in self.out_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``Tensor[B, in_chans, H, W]`` -> ``{"res2": Tensor[B, C, ceil(H/4), ceil(W/4)], ...}``.

        The outputs are in PyTorch's channels_last memory format.
        """
        stages = self.forward_stages(x, last=self.out_features[-1])
        return {name: nchw(self.output_norms[name](stages[name])) for name in self.out_features}


def build_backbone(variant: str, **overrides: Any) -> SpatialMambaBackbone:
    """Build a backbone.

    Args:
        variant: ``"tiny"``, ``"small"`` or ``"base"``.
        overrides: arguments of :class:`SpatialMambaBackbone` that replace the variant's.

    Raises:
        ValueError: the variant is unknown or an argument is out of range.
    """
    return SpatialMambaBackbone(**variant_kwargs(variant, overrides))
