from spatial_mamba_d2.ops.layer_norm_gradients.op import layer_norm_gradients

__all__ = ["layer_norm_gradients"]
