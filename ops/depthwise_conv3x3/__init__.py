from spatial_mamba_d2.ops.depthwise_conv3x3.op import (
    depthwise_conv3x3,
    depthwise_conv3x3_gradients_,
)

__all__ = ["depthwise_conv3x3", "depthwise_conv3x3_gradients_"]
