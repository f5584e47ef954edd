from spatial_mamba_d2.ops.structure_aware_ssm.op import structure_aware_ssm

__all__ = ["structure_aware_ssm"]
