"""A copy of a model that is faster on CPUs and can only be used for inference.

:func:`optimize_for_inference` is an explicit step, because what it derives from the weights is
stale after their next update. It

* folds batch norms into the convolutions that precede them;
* merges the three kernels of each state fusion into their 25 taps, and computes ``A``;
* packs the weights of matrix products and convolutions for oneDNN, which then applies the GELU or
  ReLU that follows while results are in registers;
* computes 3x3 convolutions of many channels by Winograd's algorithm on CPUs;
* on CPUs, also optimises a detector's feature pyramid and heads
  (:mod:`spatial_mamba_d2.detection.optimized`);
* fuses position encodings with the norms that follow, computes delta inside the SSM, and computes
  the SSM's output and the residual sums in place;
* on other devices than CPUs, adds a convolution's bias, its residual and ReLU in one pass, or
  inside the next convolution, and sums residuals inside matrix products;
* processes activations that are several times as wide as the stage (inside the MLP, between the
  convolutions of stem and downsampling) in tiles, so that they stay in the cache. The operating
  system would also have to provide larger ones page by page in every call. On other devices, a tile
  is the entire map.

The authors' code caches merged kernels in eval mode instead, which went stale (their issue #27).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spatial_mamba_d2.models.inference_only import (
    InferenceOnly,
    inference_only,
    mention_autocast,
    refuse_gradients,
)
from spatial_mamba_d2.models.layers import ConvLayer, DepthwiseConv, nchw, nhwc
from spatial_mamba_d2.models.packed import PackedConv, PackedLinear, Part, is_on_cpu, packed_conv
from spatial_mamba_d2.models.spatial_mamba import Block, Downsample, Stage, Stem
from spatial_mamba_d2.models.ssm import StructureAwareSSM
from spatial_mamba_d2.models.upernet import ConvBNReLU, FCNHead, UPerHead
from spatial_mamba_d2.ops import (
    depthwise_conv3x3_layer_norm,
    depthwise_conv3x3_stride2,
    gated_layer_norm,
    structure_aware_ssm_from_dt,
    structure_aware_ssm_from_dt_,
)

#: Size of the widest activation of a tile on CPUs. Tuned on two cores of an AMD EPYC that share 32
#: MiB of cache, for the tiny backbone: 8 MiB is faster than 2 or 4.
TILE_BYTES = 8 * 2**20


def optimize_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of ``model`` for inference in eval mode; ``model`` stays as it is.

    The copy takes the same inputs and returns the same outputs, within 1e-4 of the largest value in
    float32. Hooks of the model and of copied parts are kept, those of replaced parts are not. It
    raises ``RuntimeError`` on ``train()``, on gradients, on ``state_dict()`` and
    ``load_state_dict()``, on ``.to()`` with another dtype or device, under ``torch.func``, and if
    it is traced or exported. Its matrix products and convolutions ignore autocast, which is
    logged once. If oneDNN is unavailable (on devices other than CPUs, in float64, in a PyTorch
    built without it), weights are folded but not packed. It can be pickled.

    Args:
        model: a backbone, a classifier, a UPerNet, or any module that contains them, such as a
            detector; parts without an optimised form are copied. An optimised model is returned as
            it is.
        dtype: dtype of the activations between layers and of the large weights, by default the
            model's. ``torch.bfloat16`` is as precise as autocast: states and all statistics are
            float32, and so are the outputs.

    Raises:
        ValueError: ``model`` has no part to optimise, or one that contains foreign layers, such as
            adapters; or ``dtype`` is not floating point.
    """
    if isinstance(model, InferenceOnly):
        return model
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type, got {dtype}")
    if not any(type(part) in _OPTIMIZED for part in model.modules()):
        raise ValueError(
            "model must be or contain a Spatial-Mamba backbone, a classifier or a UPerNet, "
            f"got {type(model).__name__}"
        )
    optimized = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        replace_children(optimized, dtype)
    model_class: Any = type(model)
    optimized.__class__ = inference_only(model_class)
    optimized.register_forward_pre_hook(refuse_gradients)
    optimized.register_forward_pre_hook(partial(mention_autocast, dtype=dtype))
    return optimized.eval()


def _fold(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    return fuse_conv_bn_eval(conv, norm) if isinstance(norm, _BatchNorm) else conv


def _act_name(layer: ConvLayer) -> str:
    return "relu" if isinstance(layer.act, nn.ReLU) else "none"


def _packed_conv(layer: Any, dtype: torch.dtype | None) -> PackedConv:
    return PackedConv(_fold(layer.conv, layer.norm), dtype, _act_name(layer))


def _packed_pointwise(layer: Any, dtype: torch.dtype | None) -> PackedLinear:
    """1x1 convolution as a matrix product over channels-last tokens."""
    conv = _fold(layer.conv, layer.norm)
    return PackedLinear(conv.weight.flatten(1), conv.bias, dtype, _act_name(layer))


def _tile_bytes(x: Tensor) -> int:
    """The size of tiles where ``x`` is."""
    return TILE_BYTES if is_on_cpu(x) else sys.maxsize


def _halve_in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, row_bytes: int) -> Tensor:
    """``function(x)``, a 3x3 convolution of stride 2 and pointwise layers, in tiles of rows.

    Args:
        function: ``Tensor[B, h, W, C]`` -> ``Tensor[B, ceil(h/2), ceil(W/2), C']``.
        x: ``Tensor[B, H, W, C]``.
        row_bytes: size of the widest activation inside ``function`` per row of ``x``.
    """
    rows = max(_tile_bytes(x) // row_bytes // 2 * 2, 4)
    tiles = [function(x[:, :rows])]
    for top in range(rows, x.shape[1], rows):
        # The convolution needs one more row above the tile. Two keep the stride aligned, and the
        # row of output that they add is dropped.
        tiles.append(function(x[:, top - 2 : top + rows])[:, 1:])
    return torch.cat(tiles, dim=1) if len(tiles) > 1 else tiles[0]


def _add_in_tiles(add: Callable[..., None], token_bytes: int, x: Tensor, *maps: Tensor) -> Tensor:
    """``add(x, *maps)``, in tiles of tokens.

    Args:
        add: adds what it computes from ``Tensor[tokens, C_i], ...`` to ``Tensor[tokens, C]``.
        token_bytes: size of the widest activation inside ``add`` per token.
        x: ``Tensor[B, H, W, C]``, contiguous.
        maps: ``Tensor[B, H, W, C_i]``, contiguous.
    """
    num_tokens = x.shape[:3].numel()
    num_tiles = math.ceil(num_tokens * token_bytes / _tile_bytes(x))
    tile_tokens = math.ceil(num_tokens / num_tiles)  # of one size, because small tiles are slow
    for out, *tiles in zip(*(t.flatten(0, 2).split(tile_tokens) for t in (x, *maps)), strict=True):
        add(out, *tiles)
    return x


class OptimizedStem(Part):
    """:class:`~.spatial_mamba.Stem`, in ``dtype``."""

    def __init__(self, stem: Stem, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = stem.dtype  # of the images
        self.conv1 = _packed_conv(stem.conv1, dtype)
        self.conv1.stays_exact = True  # of the image, which the rest depends on
        self.conv2 = nn.ModuleList(_packed_conv(layer, dtype) for layer in stem.conv2)
        widen, narrow = stem.conv3
        self.widen = _packed_conv(widen, dtype)
        self.narrow = _packed_pointwise(narrow, dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Two steps, because to(dtype, memory_format=...) takes twice as long.
        x = x.contiguous(memory_format=torch.channels_last).to(self.conv1.dtype)
        x = self.conv1(x)
        first, second = self.conv2
        x = nhwc(second.add_to(x, first(x)))  # type: ignore[operator]  # a method of both kinds
        batch, _, width, _ = x.shape
        widened_row_bytes = batch * ((width + 1) // 2) * self.widen.out_dim * x.element_size()
        # The widened map has half as many rows as x.
        return _halve_in_tiles(self.widen_and_narrow, x, widened_row_bytes // 2)

    def widen_and_narrow(self, x: Tensor) -> Tensor:
        """``Tensor[B, h, W, C/2]`` -> ``Tensor[B, ceil(h/2), ceil(W/2), C]``."""
        return self.narrow(nhwc(self.widen(nchw(x))))


class OptimizedDownsample(Part):
    """:class:`~.spatial_mamba.Downsample`, in ``dtype``."""

    def __init__(self, downsample: Downsample, dtype: torch.dtype | None):
        super().__init__()
        expand, reduce = downsample.expand.conv, downsample.reduce.conv
        act = "relu" if is_on_cpu(expand.weight) else "none"  # halve() has both ReLUs
        self.expand = PackedLinear(expand.weight.flatten(1), expand.bias, dtype, act)
        self.reduce = PackedConv(reduce, dtype, act)
        self.project = _packed_pointwise(downsample.project, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.expand.dtype)
        if not is_on_cpu(x):
            return self.project(self.halve(self.expand(x)))
        row_bytes = len(x) * x.shape[2] * self.expand.out_dim * x.element_size()
        return _halve_in_tiles(
            lambda x: self.project(nhwc(self.reduce(nchw(self.expand(x))))), x, row_bytes
        )

    def halve(self, x: Tensor) -> Tensor:
        """``Tensor[B, H, W, C]`` -> ``Tensor[B, ceil(H/2), ceil(W/2), C]``."""
        assert self.reduce.bias is not None
        return depthwise_conv3x3_stride2(x, self.reduce.weight, self.reduce.bias)


class OptimizedSSM(Part):
    """:class:`~.ssm.StructureAwareSSM`, with ``A`` and the taps computed."""

    A: Tensor
    taps: Tensor

    def __init__(self, ssm: StructureAwareSSM, dtype: torch.dtype | None):
        super().__init__()
        # On CPUs two products, because the gate computes z in tiles.
        weight = ssm.in_proj.weight
        parts = weight.chunk(2) if is_on_cpu(weight) else (weight,)
        self.in_proj = nn.ModuleList(PackedLinear(part, dtype=dtype) for part in parts)
        self.conv = ssm.conv
        self.split_sizes = ssm.split_sizes
        self.x_proj = PackedLinear(ssm.x_proj.weight, dtype=dtype)
        self.x_proj.stays_exact = True  # small, and controls the scan
        self.dt_proj, self.dt_bias = ssm.dt_proj, ssm.dt_bias
        self.D, self.out_norm = ssm.D, ssm.out_norm
        self.register_buffer("A", -torch.exp(ssm.A_log.float().flatten()))
        self.register_buffer("taps", ssm.fusion())
        self.out_proj = PackedLinear(ssm.out_proj.weight, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual += ssm(x)``, both ``Tensor[B, H, W, C]``."""
        u, *z = self.in_proj[0](x).split(self.conv.in_channels, dim=-1)  # [B, H, W, D] each
        u = self.conv(u)
        dt, B, C = self.x_proj(u).split(self.split_sizes, dim=-1)
        B, C = B.squeeze(-1), C.squeeze(-1)
        # Each of the two has a kernel on one type of device.
        ssm = structure_aware_ssm_from_dt_ if is_on_cpu(u) else structure_aware_ssm_from_dt
        y = ssm(u, dt, self.dt_proj.weight, self.A, B, C, self.D, self.dt_bias, self.taps)
        if z:
            self.add_gated(residual.flatten(0, 2), y, *z)
            return residual
        token_bytes = self.conv.in_channels * y.element_size()
        return _add_in_tiles(self.add_gated_tile, token_bytes, residual, x, y)

    def add_gated_tile(self, out: Tensor, x: Tensor, y: Tensor) -> None:
        """From ``Tensor[tokens, C], Tensor[tokens, D]`` to ``Tensor[tokens, C]``."""
        self.add_gated(out, *(tokens[None, None] for tokens in (y, self.in_proj[1](x))))

    def add_gated(self, out: Tensor, y: Tensor, z: Tensor) -> None:
        """From ``Tensor[B, H, W, D]``, twice, to ``Tensor[B H W, C]``."""
        norm = self.out_norm
        y = gated_layer_norm(y, z, norm.weight, norm.bias, norm.eps)
        self.out_proj.add_to(out, y.flatten(0, 2))


class PositionEncodingNorm(Part):
    """``x + conv(x)`` and its layer norm: ``Tensor[B, H, W, C]`` -> two of the same shape."""

    def __init__(self, conv: DepthwiseConv, norm: nn.LayerNorm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        conv, norm = self.conv, self.norm
        return depthwise_conv3x3_layer_norm(
            x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps
        )


def _bias_as_weight(
    weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, None]]:
    """Two layers with GELU between them, the second without a bias.

    Its bias becomes the weight of a hidden value that is always 10, which is GELU(10). A product
    without a bias is added to the residual inside the product. There are 8 values more, because
    widths are multiples of 8 for tensor cores.
    """
    more = 8
    weight1 = torch.cat((weight1, weight1.new_zeros(more, weight1.shape[1])))
    bias1 = torch.cat((bias1, bias1.new_full((more,), 10.0)))
    columns = weight2.new_zeros(len(weight2), more)
    columns[:, 0] = bias2 / 10
    return (weight1, bias1), (torch.cat((weight2, columns), dim=1), None)


class OptimizedBlock(Part):
    """:class:`~.spatial_mamba.Block`, in ``dtype``."""

    def __init__(self, block: Block, dtype: torch.dtype | None):
        super().__init__()
        self.cpe1_ln1 = PositionEncodingNorm(block.cpe1, block.ln1)
        self.ssm = OptimizedSSM(block.ssm, dtype)
        self.cpe2_ln2 = PositionEncodingNorm(block.cpe2, block.ln2)
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        layers: Any = (fc1.weight, fc1.bias), (fc2.weight, fc2.bias)
        if not is_on_cpu(fc1.weight):
            layers = _bias_as_weight(*layers[0], *layers[1])
        (weight1, bias1), (weight2, bias2) = layers
        self.fc1 = PackedLinear(weight1, bias1, dtype, act="gelu")
        self.fc2 = PackedLinear(weight2, bias2, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x, normalized = self.cpe1_ln1(x)
        x = self.ssm(normalized, residual=x)
        x, normalized = self.cpe2_ln2(x)
        return _add_in_tiles(self.add_mlp, self.fc1.out_dim * x.element_size(), x, normalized)

    def add_mlp(self, out: Tensor, x: Tensor) -> None:
        """From ``Tensor[tokens, C]`` to the same shape."""
        self.fc2.add_to(out, self.fc1(x))


class OptimizedStage(Part):
    """:class:`~.spatial_mamba.Stage`: blocks in ``dtype``, the output in the model's."""

    def __init__(self, stage: Any, dtype: torch.dtype | None):
        super().__init__()
        self.out_dtype = stage.blocks[0].ln1.weight.dtype
        self.blocks = nn.Sequential(*(OptimizedBlock(block, dtype) for block in stage.blocks))
        downsample = stage.downsample
        self.downsample = downsample and OptimizedDownsample(downsample, dtype)

    def forward(self, x: Tensor, grad_checkpointing: bool = False) -> Tensor:
        return self.blocks(x).to(self.out_dtype)


def _packed_conv_bn_relu(layer: ConvBNReLU, dtype: torch.dtype | None) -> nn.Module:
    return packed_conv(_fold(layer.conv, layer.bn), dtype, "relu")


def _optimized_head(head: Any, dtype: torch.dtype | None) -> nn.Module:
    """Convolutions in ``dtype``, the logits in the model's."""
    replace_children(head, dtype)
    head.classify = PackedConv(head.classify, dtype, out_dtype=head.classify.weight.dtype)
    head.classify.stays_exact = True
    return head


#: where the layers that the optimised parts compute are defined
_KNOWN_PACKAGES = ("torch.nn.", "timm.layers.", "spatial_mamba_d2.models.")
_Optimize = Callable[[Any, torch.dtype | None], nn.Module | None]
_OPTIMIZED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    Stem: OptimizedStem,
    Stage: OptimizedStage,
    UPerHead: _optimized_head,
    FCNHead: _optimized_head,
    ConvBNReLU: _packed_conv_bn_relu,
}
#: parts of other libraries' models
_REGISTERED: dict[type[nn.Module], _Optimize] = {}


def register_optimized(part_type: type[nn.Module], optimize: _Optimize) -> None:
    """Let :func:`optimize_for_inference` replace parts of exactly this type.

    Args:
        optimize: from a copy of a part and the dtype of activations to what replaces it, or None if
            the part stays and its own parts are replaced. It may change the copy.
    """
    _REGISTERED[part_type] = optimize


def is_known(layer: nn.Module, *packages: str) -> bool:
    """Whether PyTorch, timm, this package or ``packages`` define what ``layer`` computes."""
    return type(layer).forward.__module__.startswith((*_KNOWN_PACKAGES, *packages))


def _check_layers(part: nn.Module) -> None:
    """Raise ``ValueError`` if a layer was replaced by another, whose forward would be ignored."""
    for name, layer in part.named_modules():
        if not is_known(layer):
            raise ValueError(
                f"model must consist of its own layers, got {type(layer).__name__} as {name} of a "
                f"{type(part).__name__}; merge adapters into the layers first"
            )


def replace_children(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace the parts of ``module`` that have an optimised form, in place."""
    for name, child in module.named_children():
        optimized: nn.Module | None = None
        if type(child) in _OPTIMIZED:
            _check_layers(child)
            optimized = _OPTIMIZED[type(child)](child, dtype)
        elif type(child) in _REGISTERED:
            optimized = _REGISTERED[type(child)](child, dtype)
        if optimized is None:
            replace_children(child, dtype)
        else:
            setattr(module, name, optimized)
