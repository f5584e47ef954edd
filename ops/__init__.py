"""Operators of Spatial-Mamba, channels-last, defined through ``torch.library``.

Every operator lives in a folder of its own with the same files: ``op.py`` (schema, documentation,
autograd), ``reference.py`` (the readable truth) and ``eager.py`` (fast plain PyTorch). The
dispatcher picks the kernel; ``SMD2_BACKEND=reference|eager|native`` forces one (see
:mod:`spatial_mamba_d2.ops._extension`).
"""

from spatial_mamba_d2.ops.depthwise_conv3x3 import depthwise_conv3x3
from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm import depthwise_conv3x3_layer_norm
from spatial_mamba_d2.ops.gated_layer_norm import gated_layer_norm
from spatial_mamba_d2.ops.low_rank_structure_aware_ssm import low_rank_structure_aware_ssm_
from spatial_mamba_d2.ops.selective_scan import selective_scan
from spatial_mamba_d2.ops.state_fusion import merge_taps, state_fusion
from spatial_mamba_d2.ops.structure_aware_ssm import structure_aware_ssm

__all__ = [
    "depthwise_conv3x3",
    "depthwise_conv3x3_layer_norm",
    "gated_layer_norm",
    "low_rank_structure_aware_ssm_",
    "merge_taps",
    "selective_scan",
    "state_fusion",
    "structure_aware_ssm",
]
