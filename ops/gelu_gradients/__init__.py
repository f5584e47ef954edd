from spatial_mamba_d2.ops.gelu_gradients.op import gelu_gradients

__all__ = ["gelu_gradients"]
