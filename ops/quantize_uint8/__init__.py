from spatial_mamba_d2.ops.quantize_uint8.op import quantize_uint8

__all__ = ["quantize_uint8"]
