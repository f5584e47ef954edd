"""Formulas for the FLOP counters of PyTorch and fvcore, which know no custom operators.

PyTorch's counter has a registry. fvcore has a table of defaults, which is extended when a program
imports it; this package neither needs nor imports fvcore.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_FVCORE = "fvcore.nn.flop_count"
#: Multiply-adds per element of the first input, as the authors count: 7 for the scan, 9 for each
#: 3x3 convolution, 5 for a norm, nothing for element-wise operations.
MULTIPLY_ADDS = {
    "selective_scan": 7,
    "state_fusion": 3 * 9,
    "structure_aware_ssm": 7 + 3 * 9,
    "depthwise_conv3x3": 9,
    "gated_layer_norm": 5,
}
_INFERENCE_MULTIPLY_ADDS = {
    "depthwise_conv3x3_layer_norm": 9 + 5,
    "structure_aware_ssm_from_dt_": MULTIPLY_ADDS["structure_aware_ssm"],
}


def register_formulas() -> None:
    """Tell PyTorch's counter now, and fvcore's when it is imported."""
    for name, count in {**MULTIPLY_ADDS, **_INFERENCE_MULTIPLY_ADDS}.items():
        packets = torch.ops.spatial_mamba
        register_flop_formula(getattr(packets, name))(_formula(2 * count))
        if name in MULTIPLY_ADDS:  # a backward pass counts twice, as PyTorch has it
            register_flop_formula(getattr(packets, f"{name}_backward"))(_formula(4 * count))
    if _FVCORE in sys.modules:
        _extend_fvcore(sys.modules[_FVCORE])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _formula(count: int) -> Callable[..., int]:
    def flops(first_shape: Sequence[int], *_: Any, **__: Any) -> int:
        return count * prod(first_shape)

    return flops


def _extend_fvcore(module: ModuleType) -> None:
    def handle(count: int) -> Callable[..., int]:
        return lambda inputs, outputs: count * prod(inputs[0].type().sizes())

    table = getattr(module, "_DEFAULT_SUPPORTED_OPS", {})
    for name, count in MULTIPLY_ADDS.items():
        table.setdefault(f"spatial_mamba::{name}", handle(count))


class _WhenImported:
    """Import hook that extends fvcore's table once, after its module has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _FVCORE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _extend_fvcore(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
