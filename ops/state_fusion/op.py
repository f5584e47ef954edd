"""``spatial_mamba::state_fusion``: schema, documentation, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.state_fusion import eager, reference
from spatial_mamba_d2.ops.state_fusion.taps import TAPS

_extension.define("state_fusion(Tensor h, Tensor taps) -> Tensor")
_extension.define(
    "state_fusion_backward(Tensor grad_output, Tensor h, Tensor taps) -> (Tensor, Tensor)"
)
_extension.register_python(
    "state_fusion", eager=eager.state_fusion, reference=reference.state_fusion
)
_extension.register_python(
    "state_fusion_backward",
    eager=eager.state_fusion_backward,
    reference=_extension.gradients_of(reference.state_fusion),
)


@torch.library.register_fake("spatial_mamba::state_fusion", lib=_extension.LIBRARY)
def _(h, taps):
    return torch.empty_like(
        h,
        dtype=torch.promote_types(h.dtype, torch.float32),
        memory_format=torch.contiguous_format,
    )


@torch.library.register_fake("spatial_mamba::state_fusion_backward", lib=_extension.LIBRARY)
def _(grad_output, h, taps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (h, taps))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_output):
    return torch.ops.spatial_mamba.state_fusion_backward(grad_output, *ctx.saved_tensors)


torch.library.register_autograd(
    "spatial_mamba::state_fusion", _backward, setup_context=_setup_context, lib=_extension.LIBRARY
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
    check_activation("state_fusion", "h", h, "B H W D")
    check_tensor("state_fusion", "taps", taps, (TAPS, h.shape[-1]), "[25, D]")
    return torch.ops.spatial_mamba.state_fusion(h, taps)
