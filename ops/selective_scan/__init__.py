from spatial_mamba_d2.ops.selective_scan.op import selective_scan

__all__ = ["selective_scan"]
