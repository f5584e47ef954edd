from spatial_mamba_d2.ops.depthwise_conv3x3_stride2.op import depthwise_conv3x3_stride2

__all__ = ["depthwise_conv3x3_stride2"]
