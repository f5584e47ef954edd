"""``spatial_mamba::depthwise_conv3x3_layer_norm``: schema and documentation."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.depthwise_conv3x3_layer_norm import eager, reference

_NAME = "depthwise_conv3x3_layer_norm"
_extension.define(
    f"{_NAME}(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, "
    "float eps) -> (Tensor, Tensor)"
)
_extension.register_python(
    _NAME,
    eager=eager.depthwise_conv3x3_layer_norm,
    reference=reference.depthwise_conv3x3_layer_norm,
    by_design=("cuda",),
)


@torch.library.register_fake(f"spatial_mamba::{_NAME}", lib=_extension.LIBRARY)
def _(x, weight, bias, norm_weight, norm_bias, eps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))


def _backward(ctx, *gradients) -> NoReturn:
    raise RuntimeError(
        f"{_NAME} is for inference and has no gradients; depthwise_conv3x3 and "
        "torch.nn.functional.layer_norm have"
    )


torch.library.register_autograd(f"spatial_mamba::{_NAME}", _backward, lib=_extension.LIBRARY)


def depthwise_conv3x3_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """A position encoding of Spatial-Mamba's block and the norm behind it; for inference only.

    ``y = x + conv(x)`` as :func:`depthwise_conv3x3` with ``residual`` has it, and ``LayerNorm(y)``:
    ``SpatialMambaBlock.cpe1`` and ``ln_1``, ``cpe2`` and ``ln_2`` of the authors' code.

    Args:
        x: ``Tensor[B, H, W, D]``; its tokens must lie evenly for the fast kernels, else it is
            copied.
        weight: of the convolution, ``Tensor[D, 1, 3, 3]``.
        bias: of the convolution, ``Tensor[D]``.
        norm_weight, norm_bias: of the norm, ``Tensor[D]``.
        eps: added to the variance.

    Returns:
        y and its norm, two ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``x``; sums are
        float32 (float64 for float64 ``x``).

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: in backward.
    """
    check_activation(_NAME, "x", x, "B H W D")
    dim = x.shape[-1]
    check_tensor(_NAME, "weight", weight, (dim, 1, 3, 3), "[D, 1, 3, 3]")
    for name, value in {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        check_tensor(_NAME, name, value, (dim,), "[D]")
    return torch.ops.spatial_mamba.depthwise_conv3x3_layer_norm(
        x, weight, bias, norm_weight, norm_bias, eps
    )
