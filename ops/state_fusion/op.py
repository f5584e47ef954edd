"""``spatial_mamba::state_fusion``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops._precision import accumulation_dtype, empty_output
from spatial_mamba_d2.ops.state_fusion import cuda, eager, reference
from spatial_mamba_d2.ops.state_fusion.taps import TAPS

_NAME = "state_fusion"
_extension.define(
    _NAME,
    fake=lambda h, _: empty_output(h, accumulation_dtype(h)),
    eager=eager.state_fusion,
    reference=reference.state_fusion,
    eager_backward=eager.state_fusion_backward,
    cuda=cuda.state_fusion,
    cuda_backward=cuda.state_fusion_backward,
)


def state_fusion(h: Tensor, taps: Tensor) -> Tensor:
    """Structure-aware state fusion (SASF): each state becomes a weighted sum of its neighbours.

    ``h'[y, x] = sum_k taps[k] h[y + dy_k, x + dx_k]`` per channel, over the 25 distinct taps of
    three 3x3 kernels with dilations 1, 3, 5; neighbours outside the map are the nearest ones
    inside (replicate padding). Spatial-Mamba (arXiv 2410.15091) eq. 4.

    Args:
        h: states, ``Tensor[B, H, W, D]``.
        taps: ``Tensor[25, D]``, from :func:`merge_taps`.

    Returns:
        ``Tensor[B, H, W, D]``, contiguous; float64 for float64 ``h``, else float32.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_activation(_NAME, "h", h, "B H W D")
    check_tensor(_NAME, "taps", taps, (TAPS, h.shape[-1]), "[25, D]")
    return torch.ops.spatial_mamba.state_fusion(h, taps)
