"""The parts of Detectron2's detectors in the form that is fast on CPUs.

:func:`spatial_mamba_d2.models.optimize_for_inference` replaces them; importing this package
registers them. All maps are channels-last in memory, so that nothing is reordered between the
backbone and the heads.

A part is replaced if it is of exactly the class below, on a CPU, in float32; subclasses, other
heads and parts with layers that were replaced by adapters stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone import FPN
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from spatial_mamba_d2.detection.pooling import ChannelsLastPooler, FastPooler, become
from spatial_mamba_d2.models.layers import nchw, nhwc
from spatial_mamba_d2.models.optimized import is_known, register_optimized, replace_children
from spatial_mamba_d2.models.packed import PackedLinear, Part, is_on_cpu, packed_conv


def _is_supported(part: nn.Module) -> bool:
    """Whether all layers are known, on a CPU and in float32."""
    return all(is_known(layer, "detectron2.") for layer in part.modules()) and all(
        is_on_cpu(x) and x.dtype == torch.float32 for x in part.parameters()
    )


def _is_relu(activation: Any) -> bool:
    return activation in (F.relu, F.relu_) or type(activation) is nn.ReLU


def _folded(conv: Conv2d) -> nn.Conv2d | None:
    """The convolution with its batch norm, or None if it has another norm."""
    if isinstance(conv.norm, (_BatchNorm, FrozenBatchNorm2d)):
        return fuse_conv_bn_eval(conv, conv.norm)
    return conv if conv.norm is None else None


def _optimized_conv(
    conv: Conv2d, dtype: torch.dtype | None, out_dtype: torch.dtype | None = torch.float32
) -> nn.Module | None:
    """A convolution with norm and activation, for maps of any dtype."""
    if not _is_supported(conv) or conv.padding_mode != "zeros":
        return None
    act = "relu" if _is_relu(conv.activation) else "none"
    folded = _folded(conv)
    if folded is not None and (act == "relu" or conv.activation is None):
        return _OptimizedConv(packed_conv(folded, dtype, act, out_dtype), folded)
    alone = _OptimizedConv(packed_conv(conv, dtype, out_dtype=torch.float32), conv)
    return _ConvNormAct(alone, conv.norm, conv.activation)


def _optimized_convs(
    convs: Iterable[nn.Module],
    dtype: torch.dtype | None,
    out_dtype: torch.dtype | None = torch.float32,
) -> nn.Sequential:
    """The convolutions of a head, one after the other; those that are no :class:`Conv2d` stay."""
    layers = nn.Sequential()
    for conv in convs:
        optimized = _optimized_conv(conv, dtype, out_dtype) if isinstance(conv, Conv2d) else None
        layers.append(conv if optimized is None else optimized)
    return layers


def _optimized_prediction(conv: nn.Conv2d, dtype: torch.dtype | None) -> nn.Module:
    """The last convolution of a head, whose outputs are decoded."""
    packed = packed_conv(conv, dtype, out_dtype=torch.float32)
    packed.stays_exact = True
    return _OptimizedConv(packed, conv)


class _OptimizedConv(Part):
    """A convolution that accepts empty batches: images without detections have them."""

    def __init__(self, packed: nn.Module, conv: nn.Conv2d):
        super().__init__()
        self.packed = packed
        self.out_channels = conv.out_channels
        self.kernel_size, self.padding = conv.kernel_size, conv.padding
        self.stride, self.dilation = conv.stride, conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        if len(x):
            return self.packed(x)
        like = x.new_empty(1, 1, *x.shape[2:], device="meta")
        weight = like.new_empty(1, 1, *self.kernel_size)
        size = F.conv2d(like, weight, None, self.stride, self.padding, self.dilation).shape[2:]
        return x.new_empty(0, self.out_channels, *size)


class _ConvNormAct(Part):
    """A convolution with a norm that depends on its input, such as group norm."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, activation: Any):
        super().__init__()
        self.conv, self.norm, self.activation = conv, norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class OptimizedFPN(FPN):
    """:class:`detectron2.modeling.FPN`; the maps between its layers are in ``dtype``."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.bottom_up(x)
        results: list[Tensor] = []
        top: Tensor | None = None
        convs = zip(self.lateral_convs, self.output_convs, strict=True)
        for name, (lateral, output) in zip(reversed(self.in_features), convs, strict=True):
            merged = lateral(features[name])
            if top is not None:
                _add_upsampled(merged, top)
                if self._fuse_type == "avg":
                    merged /= 2
            top = merged
            results.insert(0, output(merged))
        if self.top_block is not None:
            source = features.get(self.top_block.in_feature)
            if source is None:
                source = results[self._out_features.index(self.top_block.in_feature)]
            results.extend(self.top_block(source))
        return dict(zip(self._out_features, results, strict=True))


def _add_upsampled(x: Tensor, coarse: Tensor) -> None:
    """``x += coarse``, each of whose values counts for 2x2 pixels: ``Tensor[B, C, 2H, 2W]``."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        x += F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        return
    batch, height, width, channels = nhwc(coarse).shape
    x_ = nhwc(x).view(batch, height, 2, width, 2, channels)
    x_ += nhwc(coarse)[:, :, None, :, None]


def _optimized_fpn(fpn: FPN, dtype: torch.dtype | None) -> nn.Module | None:
    convs = [*fpn.lateral_convs, *fpn.output_convs]
    if not all(type(conv) is Conv2d and _is_supported(conv) for conv in convs):
        return None
    lateral = [_optimized_conv(conv, dtype, dtype) for conv in fpn.lateral_convs]
    output = [_optimized_conv(conv, dtype) for conv in fpn.output_convs]
    optimized = dict(zip(convs, [*lateral, *output], strict=True))
    for name, child in list(fpn.named_children()):
        if child in optimized:
            setattr(fpn, name, optimized[child])
    replace_children(fpn, dtype)
    fpn.lateral_convs, fpn.output_convs = lateral, output
    fpn.__class__ = OptimizedFPN
    return fpn


class OptimizedRPNHead(Part):
    """:class:`StandardRPNHead`, whose two outputs are one matrix product."""

    def __init__(self, head: StandardRPNHead, dtype: torch.dtype | None):
        super().__init__()
        convs = [head.conv] if isinstance(head.conv, Conv2d) else list(head.conv)
        self.convs = _optimized_convs(convs, dtype, dtype)
        layers = head.objectness_logits, head.anchor_deltas
        self.split_sizes = [layer.out_channels for layer in layers]
        weight = torch.cat([layer.weight.flatten(1) for layer in layers])
        self.predict = PackedLinear(weight, torch.cat([layer.bias for layer in layers]), dtype)
        self.predict.stays_exact = True

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs = [
            self.predict(nhwc(self.convs(x))).float().split(self.split_sizes, dim=-1)
            for x in features
        ]
        return [nchw(logits) for logits, _ in outputs], [nchw(deltas) for _, deltas in outputs]


def _optimized_rpn_head(head: StandardRPNHead, dtype: torch.dtype | None) -> nn.Module | None:
    return OptimizedRPNHead(head, dtype) if _is_supported(head) else None


class OptimizedRPN(RPN):
    """:class:`RPN` that decodes the boxes of the best anchors only."""

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """As :meth:`RPN.predict_proposals`."""
        most = self.pre_nms_topk[False]
        proposals, scores = [], []
        for of_level, logits, deltas in zip(
            anchors, pred_objectness_logits, pred_anchor_deltas, strict=True
        ):
            best, indices = logits.topk(min(most, logits.shape[1]), dim=1)  # [B, k]
            chosen = deltas.gather(1, indices[..., None].expand(-1, -1, deltas.shape[2]))
            boxes = self.box2box_transform.apply_deltas(
                chosen.flatten(0, 1), of_level.tensor[indices].flatten(0, 1)
            )
            proposals.append(boxes.view(*indices.shape, -1))
            scores.append(best)
        return find_top_rpn_proposals(
            proposals, scores, image_sizes, self.nms_thresh, most, self.post_nms_topk[False],
            self.min_box_size, False,
        )  # fmt: skip


def _optimized_rpn(rpn: RPN, dtype: torch.dtype | None) -> nn.Module:
    replace_children(rpn, dtype)
    rpn.__class__ = OptimizedRPN
    return rpn


def _optimized_pooler(pooler: ROIPooler, dtype: torch.dtype | None) -> nn.Module | None:
    return pooler if become(pooler, ChannelsLastPooler) else None


class OptimizedBoxHead(Part):
    """:class:`FastRCNNConvFCHead`, whose first matrix product takes channels-last maps."""

    def __init__(self, head: FastRCNNConvFCHead, num_bins: int, dtype: torch.dtype | None):
        super().__init__()
        self.output_shape: ShapeSpec = head.output_shape
        self.convs, self.layers = _optimized_convs(head.conv_norm_relus, dtype), nn.Sequential()
        for i, layer in enumerate(head.fcs):
            weight = layer.weight
            if i == 0:  # [O, C P Q] -> [O, P Q C]
                weight = weight.unflatten(1, (-1, num_bins)).transpose(1, 2).flatten(1)
            self.layers.append(PackedLinear(weight.contiguous(), layer.bias, dtype, act="relu"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)
        if not self.layers:
            return x
        first: Any = self.layers[0]
        return self.layers(nhwc(x).flatten(1).to(first.dtype)).float()


def _optimized_roi_heads(heads: Any, dtype: torch.dtype | None) -> nn.Module:
    height, width = heads.box_pooler.output_size
    for parent in (heads, heads.box_head):  # cascades have a list of box heads
        for name, head in list(parent.named_children()):
            if type(head) is FastRCNNConvFCHead and _is_supported(head):
                setattr(parent, name, OptimizedBoxHead(head, height * width, dtype))
    replace_children(heads, dtype)
    return heads


class OptimizedMaskHead(Part):
    """:class:`MaskRCNNConvUpsampleHead`; an object's mask is computed for its class only."""

    weight: Tensor
    bias: Tensor

    def __init__(self, head: MaskRCNNConvUpsampleHead, dtype: torch.dtype | None):
        super().__init__()
        self.convs = _optimized_convs(head.conv_norm_relus, dtype, dtype)
        # A transposed convolution of stride 2 with 2x2 kernels is four matrix products.
        weight = head.deconv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [2 2 O, C]
        self.upsample = PackedLinear(weight.contiguous(), head.deconv.bias.repeat(4), dtype, "relu")
        self.register_buffer("weight", head.predictor.weight.flatten(1))  # [K, O]
        self.register_buffer("bias", head.predictor.bias)

    def hidden(self, x: Tensor) -> Tensor:
        """``Tensor[N, C, P, Q]`` -> ``Tensor[N, P, Q, 2, 2, O]``, float32."""
        x = nhwc(self.convs(x)).to(self.upsample.dtype)
        return self.upsample(x).unflatten(-1, (2, 2, -1)).float()

    def layers(self, x: Tensor) -> Tensor:
        """Logits of all classes, ``Tensor[N, K, 2 P, 2 Q]``."""
        return nchw(_interleaved(F.linear(self.hidden(x), self.weight, self.bias)))

    def forward(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """Sets ``pred_masks``, probabilities ``Tensor[N, 1, 2 P, 2 Q]``."""
        classes = torch.cat([i.pred_classes for i in instances])
        if len(self.weight) == 1:  # one mask for all classes
            classes = torch.zeros_like(classes)
        hidden = self.hidden(x)  # [N, P, Q, 2, 2, O]
        logits = torch.bmm(hidden.flatten(1, 4), self.weight[classes, :, None])
        logits += self.bias[classes, None, None]
        masks = _interleaved(logits.view(*hidden.shape[:5], 1)).sigmoid()
        for part, of_image in zip(masks.split([len(i) for i in instances]), instances, strict=True):
            of_image.pred_masks = nchw(part)
        return instances


def _interleaved(x: Tensor) -> Tensor:
    """``Tensor[N, P, Q, 2, 2, C]`` -> ``Tensor[N, 2 P, 2 Q, C]``."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _optimized_mask_head(
    head: MaskRCNNConvUpsampleHead, dtype: torch.dtype | None
) -> nn.Module | None:
    return OptimizedMaskHead(head, dtype) if _is_supported(head) else None


def _optimized_retinanet_head(head: RetinaNetHead, dtype: torch.dtype | None) -> nn.Module | None:
    if not _is_supported(head):
        return None
    for module in list(head.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Conv2d:
                setattr(module, name, _optimized_prediction(layer, dtype))
    return head


def register_parts() -> None:
    """Let :func:`~spatial_mamba_d2.models.optimize_for_inference` know the parts above."""
    register_optimized(Conv2d, _optimized_conv)
    register_optimized(FPN, _optimized_fpn)
    register_optimized(RPN, _optimized_rpn)
    register_optimized(StandardRPNHead, _optimized_rpn_head)
    register_optimized(ROIPooler, _optimized_pooler)
    register_optimized(FastPooler, _optimized_pooler)
    register_optimized(StandardROIHeads, _optimized_roi_heads)
    register_optimized(CascadeROIHeads, _optimized_roi_heads)
    register_optimized(MaskRCNNConvUpsampleHead, _optimized_mask_head)
    register_optimized(RetinaNetHead, _optimized_retinanet_head)
