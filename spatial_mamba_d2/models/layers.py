"""Layers of :mod:`.spatial_mamba` that PyTorch and timm do not have in the form needed.

Training computes their outputs again rather than keeps them (:mod:`.recompute`). Unless it says
otherwise, tensors are ``[B, H, W, C]``.
"""

from __future__ import annotations

import torch
import torch.fx
from timm.layers import DropPath
from timm.layers import drop_path as stochastic_depth
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2.models.pointwise import pointwise
from spatial_mamba_d2.models.recompute import cast_for_autocast, recompute, without_autocast
from spatial_mamba_d2.ops import depthwise_conv3x3, depthwise_conv3x3_stride2, gated_layer_norm
from spatial_mamba_d2.ops.cuda.kernels import run_on

# These look at shapes, which are unknown while torch.fx traces, so they become nodes of its graph.
torch.fx.wrap("depthwise_conv3x3")
torch.fx.wrap("depthwise_conv3x3_stride2")
torch.fx.wrap("gated_layer_norm")
torch.fx.wrap("pointwise")
torch.fx.wrap("stochastic_depth")


def nchw(x: Tensor) -> Tensor:
    """``[B, H, W, C]`` -> ``[B, C, H, W]``, a view in PyTorch's channels_last memory format."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, H, W, C]``, a view."""
    return x.permute(0, 2, 3, 1)


class PointwiseConv(nn.Conv2d):
    """A 1x1 ``torch.nn.Conv2d``, as the linear layer over channels that it is."""

    recompute_output = False

    def forward(self, x: Tensor) -> Tensor:
        operands = cast_for_autocast(nhwc(x), self.weight, self.bias)
        if self.recompute_output:
            return nchw(recompute(_pointwise, *operands))
        return nchw(_pointwise(*operands))


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return pointwise(x, weight.flatten(1), bias)


class ExpandingConv(PointwiseConv):
    """:class:`PointwiseConv` to many more channels, which training computes again."""

    recompute_output = True


class ReLU(nn.ReLU):
    """``torch.nn.ReLU``, in place in inference; training computes its output again."""

    def forward(self, x: Tensor) -> Tensor:
        return recompute(F.relu, x) if torch.is_grad_enabled() else F.relu_(x)


class HalvingConv(nn.Conv2d):
    """``ReLU(conv(ReLU(x)))`` of ``Tensor[B, C, H, W]``, depthwise 3x3 of stride 2."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nchw(recompute(depthwise_conv3x3_stride2, nhwc(x), self.weight, self.bias))


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` whose output training computes again rather than keeps.

    On a GPU, its output has the dtype of ``x`` under autocast as well, which would convert entire
    maps to float32 and back. Sums are float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if run_on(x):
            return recompute(_layer_norm, x, self.weight, self.bias, self.eps)
        return recompute(F.layer_norm, x, self.normalized_shape, self.weight, self.bias, self.eps)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    with without_autocast(x.device.type):
        return torch.native_layer_norm(x, weight.shape, weight, bias, eps)[0]


class GatedLayerNorm(nn.LayerNorm):
    """``LayerNorm(y) * SiLU(z)``, of two ``Tensor[B, H, W, D]``."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]  # two inputs
        return recompute(gated_layer_norm, y, z, self.weight, self.bias, self.eps)


class ConvLayer(nn.Module):
    """Convolution, optionally followed by batch norm and ReLU; ``Tensor[B, C, H, W]``.

    Args:
        conv: class of the convolution.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        norm: bool = True,
        bias: bool = False,
        act: bool = True,
        conv: type[nn.Conv2d] = nn.Conv2d,
    ):
        super().__init__()
        self.conv = conv(
            in_dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_dim) if norm else nn.Identity()
        self.act = ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3x3 convolution of ``Tensor[B, H, W, C]`` with zero padding.

    Args:
        residual: add the input to the convolution; otherwise apply SiLU to it.
    """

    bias: Tensor

    def __init__(self, dim: int, residual: bool):
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return recompute(depthwise_conv3x3, x, self.weight, self.bias, self.residual)


class StochasticDepth(DropPath):
    """timm's ``DropPath`` and the residual sum, in a form that torch.fx can trace."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]  # two
        """``residual + DropPath(x)``, of two ``Tensor[B, H, W, C]``."""
        if self.training and self.drop_prob and run_on(x):
            return self.add(x, residual, self.factor(x))
        return residual + stochastic_depth(x, self.drop_prob, self.training, self.scale_by_keep)

    def factor(self, x: Tensor) -> Tensor | None:
        """What each image of the branch ``x`` is multiplied by, ``Tensor[B, 1, 1, 1]``, at random.

        ``None`` where nothing is dropped.
        """
        if not self.training or not self.drop_prob:
            return None
        return stochastic_depth(
            x.new_ones(len(x), 1, 1, 1), self.drop_prob, True, self.scale_by_keep
        )

    @staticmethod
    def add(x: Tensor, residual: Tensor, factor: Tensor | None) -> Tensor:
        """``residual + factor x``, without a pass for the product."""
        return residual + x if factor is None else torch.addcmul(residual, x, factor)
