from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm.op import depthwise_conv3x3_layer_norm

__all__ = ["depthwise_conv3x3_layer_norm"]
