"""Operators of Spatial-Mamba, channels-last, defined through ``torch.library``.

Each operator has a line in ``schemas.h`` and a folder with the same files: ``op.py``
(documentation, argument checks), ``reference.py`` (the readable truth) and ``eager.py`` (fast plain
PyTorch). The dispatcher picks the kernel; ``SMD2_BACKEND=reference|eager|native`` forces one (see
:mod:`spatial_mamba_d2.ops._extension`).

One stem names an operator's folder, function, schema, kernels and test. An operator that works in
place has PyTorch's trailing underscore in addition, in the function and the schema only.
``<name>_gradients_`` is in the folder of ``<name>``, whose kernels it shares.
"""

import warnings
from typing import Any

from spatial_mamba_d2.ops._flops import fvcore_handles, register_formulas
from spatial_mamba_d2.ops.add_bias import add_bias_
from spatial_mamba_d2.ops.depthwise_conv3x3 import (
    depthwise_conv3x3,
    depthwise_conv3x3_gradients_,
)
from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm import depthwise_conv3x3_layer_norm
from spatial_mamba_d2.ops.depthwise_conv3x3_stride2 import depthwise_conv3x3_stride2
from spatial_mamba_d2.ops.gated_layer_norm import gated_layer_norm, gated_layer_norm_gradients_
from spatial_mamba_d2.ops.gelu_gradients import gelu_gradients
from spatial_mamba_d2.ops.layer_norm_gradients import layer_norm_gradients
from spatial_mamba_d2.ops.quantize_uint8 import quantize_uint8
from spatial_mamba_d2.ops.roi_align import roi_align
from spatial_mamba_d2.ops.selective_scan import selective_scan
from spatial_mamba_d2.ops.state_fusion import merge_taps, state_fusion
from spatial_mamba_d2.ops.structure_aware_ssm import structure_aware_ssm
from spatial_mamba_d2.ops.structure_aware_ssm_from_dt import (
    structure_aware_ssm_from_dt,
    structure_aware_ssm_from_dt_,
)
from spatial_mamba_d2.ops.winograd_conv3x3 import winograd_conv3x3, winograd_weight

__all__ = [
    "add_bias_",
    "depthwise_conv3x3",
    "depthwise_conv3x3_gradients_",
    "depthwise_conv3x3_layer_norm",
    "depthwise_conv3x3_stride2",
    "fvcore_handles",
    "gated_layer_norm",
    "gated_layer_norm_gradients_",
    "gelu_gradients",
    "layer_norm_gradients",
    "merge_taps",
    "quantize_uint8",
    "roi_align",
    "selective_scan",
    "state_fusion",
    "structure_aware_ssm",
    "structure_aware_ssm_from_dt",
    "structure_aware_ssm_from_dt_",
    "winograd_conv3x3",
    "winograd_weight",
]

register_formulas()


def __getattr__(name: str) -> Any:
    if name == "low_rank_structure_aware_ssm_":
        warnings.warn(
            f"spatial_mamba_d2.ops.{name} is deprecated and will be removed in version 0.2: "
            "use structure_aware_ssm_from_dt_",
            DeprecationWarning,
            stacklevel=2,
        )
        return structure_aware_ssm_from_dt_
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
