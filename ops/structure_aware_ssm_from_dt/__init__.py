from spatial_mamba_d2.ops.structure_aware_ssm_from_dt.op import (
    structure_aware_ssm_from_dt,
    structure_aware_ssm_from_dt_,
)

__all__ = ["structure_aware_ssm_from_dt", "structure_aware_ssm_from_dt_"]
