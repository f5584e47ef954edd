"""``spatial_mamba::winograd_conv3x3``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.winograd_conv3x3 import eager, reference
from spatial_mamba_d2.ops.winograd_conv3x3.factors import PANEL, PATCH

_NAME = "winograd_conv3x3"


def _fake(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return x.new_empty(*x.shape[:3], len(bias))


_extension.define(
    _NAME,
    fake=_fake,
    eager=eager.winograd_conv3x3,
    reference=reference.winograd_conv3x3,
    by_design=("cuda",),  # cuDNN's convolutions are faster there
)
_extension.forbid_gradients(_NAME, "torch.nn.functional.conv2d")


def winograd_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    """Convolution with 3x3 kernels, zero padding and stride 1, and ReLU; for inference only.

    A quarter of the multiplications of a direct convolution, by Winograd's algorithm F(4x4, 3x3),
    with the same rounding errors.

    Args:
        x: ``Tensor[B, H, W, C]``; the compiled kernels copy it unless its channels are dense and
            its tokens evenly spaced.
        weight: ``Tensor[36, P, C, 16]`` from :func:`winograd_weight`, in float32 (float64 for
            float64 ``x``), else it is converted in each call.
        bias: ``Tensor[O]``.
        relu: NaN stays NaN.

    Returns:
        ``Tensor[B, H, W, O]``, contiguous, in the dtype of ``x``; computed in float32 (float64 for
        float64 ``x``).

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: gradients are requested.
    """
    check_activation(_NAME, "x", x, "B H W C")
    check_activation(_NAME, "bias", bias, "O")
    panels = -(-len(bias) // (2 * PANEL)) * 2
    check_tensor(_NAME, "weight", weight, (PATCH**2, panels, x.shape[3], PANEL), "[36, P, C, 16]")
    return torch.ops.spatial_mamba.winograd_conv3x3(x, weight, bias, relu)
