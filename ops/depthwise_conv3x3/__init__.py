from spatial_mamba_d2.ops.depthwise_conv3x3.op import depthwise_conv3x3

__all__ = ["depthwise_conv3x3"]
