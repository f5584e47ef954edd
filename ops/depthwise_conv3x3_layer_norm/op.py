"""``spatial_mamba::depthwise_conv3x3_layer_norm``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_tensor
from spatial_mamba_d2.ops._precision import empty_output
from spatial_mamba_d2.ops.depthwise_conv3x3.op import check_convolution
from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm import cuda, eager, reference

_NAME = "depthwise_conv3x3_layer_norm"
_extension.define(
    _NAME,
    fake=lambda x, *_: (empty_output(x), empty_output(x)),
    eager=eager.depthwise_conv3x3_layer_norm,
    reference=reference.depthwise_conv3x3_layer_norm,
    cuda=cuda.depthwise_conv3x3_layer_norm,
)
_extension.forbid_gradients(_NAME, "depthwise_conv3x3 and torch.nn.functional.layer_norm")


def depthwise_conv3x3_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """A position encoding of Spatial-Mamba's block and the norm after it; for inference only.

    ``y = x + conv(x)``, as :func:`depthwise_conv3x3` computes it with ``residual``, and
    ``LayerNorm(y)``: ``SpatialMambaBlock.cpe1`` and ``ln_1``, ``cpe2`` and ``ln_2`` of the authors'
    code.

    Args:
        x: ``Tensor[B, H, W, D]``; copied under the same conditions as by
            :func:`depthwise_conv3x3`.
        weight: of the convolution, ``Tensor[D, 1, 3, 3]``.
        bias: of the convolution, ``Tensor[D]``.
        norm_weight, norm_bias: of the norm, ``Tensor[D]``.
        eps: added to the variance.

    Returns:
        y and its norm, two ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``x``. Sums are
        float32 (float64 for float64 ``x``).

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: in the backward pass.
    """
    check_convolution(_NAME, x, weight, bias)
    dim = x.shape[-1]
    check_tensor(_NAME, "norm_weight", norm_weight, (dim,), "[D]")
    check_tensor(_NAME, "norm_bias", norm_bias, (dim,), "[D]")
    return torch.ops.spatial_mamba.depthwise_conv3x3_layer_norm(
        x, weight, bias, norm_weight, norm_bias, eps
    )
