from spatial_mamba_d2.ops.add_bias.op import add_bias_

__all__ = ["add_bias_"]
