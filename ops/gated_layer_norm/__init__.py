from spatial_mamba_d2.ops.gated_layer_norm.op import (
    gated_layer_norm,
    gated_layer_norm_gradients_,
)

__all__ = ["gated_layer_norm", "gated_layer_norm_gradients_"]
