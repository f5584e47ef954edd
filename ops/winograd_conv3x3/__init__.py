from spatial_mamba_d2.ops.winograd_conv3x3.factors import winograd_weight
from spatial_mamba_d2.ops.winograd_conv3x3.op import winograd_conv3x3

__all__ = ["winograd_conv3x3", "winograd_weight"]
