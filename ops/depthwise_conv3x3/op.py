"""``spatial_mamba::depthwise_conv3x3``: schema, documentation, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.depthwise_conv3x3 import eager, reference

_NAME = "depthwise_conv3x3"
_INPUTS = "Tensor x, Tensor weight, Tensor bias, bool residual"
_extension.define(f"{_NAME}({_INPUTS}) -> Tensor")
_extension.define(f"{_NAME}_backward(Tensor grad_output, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
_extension.register_python(
    _NAME,
    eager=eager.depthwise_conv3x3,
    reference=reference.depthwise_conv3x3,
    by_design=("cuda",),
)
_extension.register_python(
    f"{_NAME}_backward",
    eager=eager.depthwise_conv3x3_backward,
    reference=_extension.gradients_of(reference.depthwise_conv3x3),
    by_design=("cuda",),
)


@torch.library.register_fake(f"spatial_mamba::{_NAME}", lib=_extension.LIBRARY)
def _(x, weight, bias, residual):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake(f"spatial_mamba::{_NAME}_backward", lib=_extension.LIBRARY)
def _(grad_output, x, weight, bias, residual):
    inputs = (x, weight, bias)
    return tuple(torch.empty_like(i, memory_format=torch.contiguous_format) for i in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.residual = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_output):
    gradients = torch.ops.spatial_mamba.depthwise_conv3x3_backward(
        grad_output, *ctx.saved_tensors, ctx.residual
    )
    return *gradients, None


torch.library.register_autograd(
    f"spatial_mamba::{_NAME}", _backward, setup_context=_setup_context, lib=_extension.LIBRARY
)


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    """Depthwise 3x3 convolution with zero padding, and what follows it in Spatial-Mamba's block.

    ``conv = bias[d] + sum_ij weight[d, 0, i, j] x[y + i - 1, x + j - 1, d]``; then ``x + conv``
    with ``residual`` (the block's position encodings), else ``SiLU(conv)`` (in front of the scan).
    ``SpatialMambaBlock.cpe1``, ``cpe2`` and ``StructureAwareSSM.conv2d`` of the authors' code.

    Args:
        x: ``Tensor[B, H, W, D]``; only ``D`` must be dense for the fast kernels.
        weight: ``Tensor[D, 1, 3, 3]``.
        bias: ``Tensor[D]``.
        residual: see above.

    Returns:
        ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``x``; sums are float32 (float64 for
        float64 ``x``) in the compiled kernels. Backward keeps only the inputs.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_activation(_NAME, "x", x, "B H W D")
    dim = x.shape[-1]
    check_tensor(_NAME, "weight", weight, (dim, 1, 3, 3), "[D, 1, 3, 3]")
    check_tensor(_NAME, "bias", bias, (dim,), "[D]")
    return torch.ops.spatial_mamba.depthwise_conv3x3(x, weight, bias, residual)
