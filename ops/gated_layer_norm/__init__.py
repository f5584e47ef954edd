from spatial_mamba_d2.ops.gated_layer_norm.op import gated_layer_norm

__all__ = ["gated_layer_norm"]
