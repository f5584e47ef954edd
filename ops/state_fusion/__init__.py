from spatial_mamba_d2.ops.state_fusion.op import state_fusion
from spatial_mamba_d2.ops.state_fusion.taps import merge_taps

__all__ = ["merge_taps", "state_fusion"]
