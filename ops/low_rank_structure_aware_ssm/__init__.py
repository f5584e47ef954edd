from spatial_mamba_d2.ops.low_rank_structure_aware_ssm.op import low_rank_structure_aware_ssm_

__all__ = ["low_rank_structure_aware_ssm_"]
