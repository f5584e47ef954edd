"""UPerNet on a Spatial-Mamba backbone, or one of timm's, with the recipe's auxiliary FCN head.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221. Computes the
same as ``UPerHead`` and ``FCNHead`` of mmsegmentation 1.2 as the Spatial-Mamba authors configure
them; :mod:`.checkpoints.names` translates the parameter names. The batch norms of the heads are
called ``bn`` there and here, because the recipe's weight decay rule depends on that name.

Symbols: K classes, F channels of the decode head. All resizing is bilinear without
``align_corners``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2.models.spatial_mamba import STAGES, SpatialMambaBackbone
from spatial_mamba_d2.models.timm_backbone import PREFIX, TimmBackbone
from spatial_mamba_d2.models.variants import variant_kwargs

POOL_SIZES = (1, 2, 3, 6)
# Scores that are held at once: the buffers of images above this are split. Images of ADE20K's usual
# 512 x 683 with 150 classes are below it.
SCORES_BYTES = 2**28
torch.fx.wrap("resize")  # a node of torch.fx's graphs, where sizes are unknown


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation, ``Tensor[B, C, H, W]`` -> ``Tensor[B, C, *size]``."""
    # An exported graph is for all sizes; interpolation to the same size changes nothing there.
    if not torch.compiler.is_exporting() and x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def argmax(scores: Tensor, dim: int = 0) -> Tensor:
    """The class with the highest score: ``uint8``, or ``int32`` if there are more than 255."""
    return scores.argmax(dim).to(_index_type(scores.shape[dim]))


def _index_type(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 255 else torch.int32  # as data/class_indices.py has it


def resized_argmax(
    scores: Tensor, sizes: Sequence[Sequence[int]], max_bytes: int = SCORES_BYTES
) -> Tensor:
    """The class of each pixel, after :func:`resize` to one size after the other.

    Args:
        scores: ``Tensor[1, K, h, w]``.
        sizes: H, W; the last one is that of the result.
        max_bytes: of resized scores that are held at once: as many classes as fit, at least one.

    Returns:
        class indices ``Tensor[H, W]``, in the type of :func:`argmax`.
    """
    height, width = sizes[-1]
    step = max(1, max_bytes // (4 * height * width))
    best = label = None
    for first in range(0, scores.shape[1], step):
        part = scores[:, first : first + step]
        for size in sizes:
            part = resize(part, size)
        value, index = part[0].max(0)
        index = index.to(_index_type(scores.shape[1])) + first
        if best is None or label is None:
            best, label = value, index
        else:
            label = torch.where(value > best, index, label)
            torch.maximum(best, value, out=best)
    assert label is not None  # there is at least one class
    return label


class ConvBNReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU; ``Tensor[B, C, H, W]``, H and W unchanged."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _classify(dim: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(dim, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest level, a feature pyramid, and a classifier on both, fused."""

    def __init__(self, in_dims: Sequence[int], channels: int, num_classes: int, dropout: float):
        super().__init__()
        *finer, coarsest = in_dims
        self.pool_convs = nn.ModuleList(ConvBNReLU(coarsest, channels, 1) for _ in POOL_SIZES)
        self.pool_fuse = ConvBNReLU(coarsest + len(POOL_SIZES) * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvBNReLU(dim, channels, 1) for dim in finer)
        self.outputs = nn.ModuleList(ConvBNReLU(channels, channels, 3) for _ in finer)
        self.fuse = ConvBNReLU(len(in_dims) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = _classify(channels, num_classes)

    def pool(self, x: Tensor, size: int) -> Tensor:
        """``Tensor[B, C, H, W]`` -> means over ``size`` x ``size`` bins."""
        return F.adaptive_avg_pool2d(x, size)

    def pool_pyramid(self, x: Tensor) -> Tensor:
        """``Tensor[B, C, H, W]`` -> ``Tensor[B, F, H, W]`` with context from the entire image."""
        pooled = [
            resize(conv(self.pool(x, size)), x.shape[-2:])
            for conv, size in zip(self.pool_convs, POOL_SIZES, strict=True)
        ]
        return self.pool_fuse(torch.cat([x, *pooled], dim=1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Four ``Tensor[B, C_i, H_i, W_i]``, finest first -> logits ``Tensor[B, K, H_0, W_0]``."""
        *finer, coarsest = features
        top = self.pool_pyramid(coarsest)
        levels = [top]  # [B, F, H_i, W_i] each, finest first
        for x, lateral in zip(reversed(finer), reversed(self.laterals), strict=True):
            top = lateral(x) + resize(top, x.shape[-2:])
            levels.insert(0, top)
        levels[:-1] = [conv(x) for conv, x in zip(self.outputs, levels[:-1], strict=True)]
        size = levels[0].shape[-2:]
        x = self.fuse(torch.cat([resize(level, size) for level in levels], dim=1))
        return self.classify(self.dropout(x))


class FCNHead(nn.Module):
    """One convolution and a classifier: ``Tensor[B, C, H, W]`` -> logits ``Tensor[B, K, H, W]``."""

    def __init__(self, in_dim: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.conv = ConvBNReLU(in_dim, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = _classify(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.dropout(self.conv(x)))


class UPerNet(nn.Module):
    """Semantic segmentation.

    Args:
        num_classes: K, the number of classes.
        channels: F, the width of the decode head.
        aux_channels: width of the auxiliary head, which is applied to ``res4``, only in training.
        dropout: probability with which each classifier's input channels are dropped.
        bn_policy: policy of the backbone, see :class:`~.spatial_mamba.SpatialMamba`. ``"sync"``
            applies to the heads too; they train their batch norms under every policy.
        timm_name: ``timm/NAME`` for a backbone of timm; by default it is a Spatial-Mamba.
        **kwargs: other arguments of the backbone, :class:`~.spatial_mamba.SpatialMambaBackbone` or
            :class:`~.timm_backbone.TimmBackbone`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 150,
        channels: int = 512,
        aux_channels: int = 256,
        dropout: float = 0.1,
        bn_policy: str = "train",
        timm_name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        sizes = {"num_classes": num_classes, "channels": channels, "aux_channels": aux_channels}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
        self.backbone: SpatialMambaBackbone | TimmBackbone
        if timm_name is None:
            self.backbone = SpatialMambaBackbone(STAGES, bn_policy=bn_policy, **kwargs)
        else:
            self.backbone = TimmBackbone(timm_name, bn_policy=bn_policy, **kwargs)
        dims = self.backbone.dims
        self.decode_head = UPerHead(dims, channels, num_classes, dropout)
        self.auxiliary_head = FCNHead(dims[2], aux_channels, num_classes, dropout)
        if bn_policy == "sync":
            for head in (self.decode_head, self.auxiliary_head):
                nn.SyncBatchNorm.convert_sync_batchnorm(head)

    def __prepare_scriptable__(self) -> NoReturn:
        """What ``torch.jit.script`` calls first."""
        raise NotImplementedError(
            "torch.jit.script does not support UPerNet, which resizes maps to sizes of any type; "
            "use torch.jit.trace or torch.export"
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Segment images of any size.

        Args:
            x: normalised images, ``Tensor[B, 3, H, W]`` with any H, W >= 1.

        Returns:
            logits, ``Tensor[B, K, ceil(H/4), ceil(W/4)]``; in train mode a pair of these and the
            auxiliary head's logits, ``Tensor[B, K, ceil(H/16), ceil(W/16)]``.

        Raises:
            ValueError: ``x`` is not such a tensor.
        """
        features = self.backbone(x)
        logits = self.decode_head(list(features.values()))
        return (logits, self.auxiliary_head(features["res4"])) if self.training else logits


def build_upernet(variant: str, num_classes: int = 150, **overrides: Any) -> UPerNet:
    """Build a UPerNet.

    Args:
        variant: backbone, ``"tiny"``, ``"small"`` or ``"base"``, or ``"timm/NAME"`` with a name of
            ``timm.list_models()``.
        overrides: arguments of :class:`UPerNet` and its backbone that replace the variant's.

    Raises:
        ValueError: the variant is unknown or an argument is out of range.
    """
    if variant.startswith(PREFIX):
        return UPerNet(num_classes=num_classes, timm_name=variant, **overrides)
    return UPerNet(num_classes=num_classes, **variant_kwargs(variant, overrides))
