"""Formulas for the FLOP counters of PyTorch and fvcore, which know no custom operators.

PyTorch's counter has a registry; fvcore's takes them in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

#: Multiply-adds per element of the output, as the authors count: 7 for the scan, 9 for each
#: 3x3 convolution, 5 for a norm, nothing for element-wise operations.
MULTIPLY_ADDS = {
    "selective_scan": 7,
    "state_fusion": 3 * 9,
    "structure_aware_ssm": 7 + 3 * 9,
    "depthwise_conv3x3": 9,
    "depthwise_conv3x3_stride2": 9,
    "gated_layer_norm": 5,
}
_INFERENCE_MULTIPLY_ADDS = {"depthwise_conv3x3_layer_norm": 9 + 5}
#: of backward passes, twice those of the forward pass, as PyTorch has it
_GRADIENTS_MULTIPLY_ADDS = {
    "depthwise_conv3x3_gradients_": 2 * 9,
    "gated_layer_norm_gradients_": 2 * 5 + 5,  # the output as well
}


def register_formulas() -> None:
    """Tell PyTorch's counter."""
    others = {**_INFERENCE_MULTIPLY_ADDS, **_GRADIENTS_MULTIPLY_ADDS}
    for name, count in {**MULTIPLY_ADDS, **others}.items():
        packets = torch.ops.spatial_mamba
        register_flop_formula(getattr(packets, name))(_formula(2 * count))
        if name in MULTIPLY_ADDS:  # a backward pass counts twice, as PyTorch has it
            register_flop_formula(getattr(packets, f"{name}_backward"))(_formula(4 * count))
    register_flop_formula(packets.structure_aware_ssm_from_dt)(_ssm_from_dt)
    register_flop_formula(packets.structure_aware_ssm_from_dt_)(_ssm_from_dt)
    register_flop_formula(packets.structure_aware_ssm_from_dt_backward)(
        lambda grad, *inputs, **_: 2 * _ssm_from_dt(*inputs)
    )


def _ssm_from_dt(u: Sequence[int], dt: Sequence[int], *_: Any, **__: Any) -> int:
    """With the product of ``dt`` and its weight, which PyTorch's counter counts as well."""
    return 2 * (MULTIPLY_ADDS["structure_aware_ssm"] + dt[-1]) * prod(u)


def _formula(count: int) -> Callable[..., int]:
    """From the shapes of an operator, or of a backward pass, whose first input is a gradient."""

    def flops(first: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
        has_one_output = isinstance(out_shape, torch.Size)
        return count * prod(out_shape if has_one_output else first)

    return flops


def fvcore_handles() -> dict[str, Callable[..., int]]:
    """Formulas for fvcore: ``FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles())``."""

    def handle(count: int) -> Callable[..., int]:
        return lambda inputs, outputs: count * prod(outputs[0].type().sizes())

    return {f"spatial_mamba::{name}": handle(count) for name, count in MULTIPLY_ADDS.items()}
