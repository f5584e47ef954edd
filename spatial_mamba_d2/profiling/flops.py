"""FLOPs by the authors' formula, to compare with their published figures.

The authors count with fvcore, whose convention this follows: one multiply-add is one FLOP;
convolutions and matrix products count in full, a layer norm as 5 per element, a batch norm as 5 in
train mode and 2 in eval mode, bilinear resizing as 4 per output and nearest as 1, adaptive pooling
as 1 per input. To that they add the scan, 7 per channel and token, and state fusion as its three
depthwise 3x3 convolutions, 27 per channel and token. Nothing else counts: no element-wise product
or sum, no activation.

The published classifiers are counted in train mode, the detectors and segmentors in eval mode.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_mamba_d2.ops._flops import MULTIPLY_ADDS


def _convolution(output: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> int:
    transposed = arguments[4]  # after bias, stride, padding and dilation
    return (x if transposed else output).numel() * prod(weight.shape[1:])


def _matrix_product(output: Tensor, a: Tensor, b: Tensor) -> int:
    return a.numel() * b.shape[-1]


def _batch_norm(output: Sequence[Tensor], x: Tensor, *arguments: Any) -> int:
    training = arguments[-3]  # before momentum and eps
    return (5 if training else 2) * x.numel()


def _per_element(count: int) -> Callable[..., int]:
    return lambda output, *_: count * output.numel()


#: Name of an ATen or our operator -> its count from output and inputs.
OFFICIAL_COUNTS: dict[str, Callable[..., int]] = {
    "convolution": _convolution,
    "mm": _matrix_product,
    "bmm": _matrix_product,
    "addmm": lambda output, bias, a, b: _matrix_product(output, a, b),
    "native_layer_norm": lambda output, x, *_: 5 * x.numel(),
    "native_batch_norm": _batch_norm,
    "upsample_nearest2d": lambda output, *_: output.numel(),
    "upsample_bilinear2d": lambda output, *_: 4 * output.numel(),
    "_adaptive_avg_pool2d": lambda output, x, *_: x.numel(),
    **{name: _per_element(count) for name, count in MULTIPLY_ADDS.items()},
}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in OFFICIAL_COUNTS:
            self.flops[name] += OFFICIAL_COUNTS[name](output, *args)
        return output


def official_flops(model: nn.Module, input_shape: Sequence[int]) -> dict[str, float]:
    """Count without computing: only shapes pass through a copy of the model.

    Args:
        model: a backbone, a classifier or a UPerNet, counted in the mode that it is in.
        input_shape: ``[B, 3, H, W]``.

    Returns:
        GFLOPs of each operator, and their ``"total"``.
    """
    shadow = copy.deepcopy(model).to("meta")
    with torch.no_grad(), _Counter() as counter:
        shadow(torch.empty(tuple(input_shape), device="meta"))
    flops = {name: count / 1e9 for name, count in counter.flops.items()}
    return {**flops, "total": sum(flops.values())}
