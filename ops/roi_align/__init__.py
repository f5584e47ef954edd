from spatial_mamba_d2.ops.roi_align.op import roi_align

__all__ = ["roi_align"]
