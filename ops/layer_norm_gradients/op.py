"""``spatial_mamba::layer_norm_gradients``: definition, documentation, argument checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops._precision import accumulation_dtype, empty_output
from spatial_mamba_d2.ops.layer_norm_gradients import cuda, eager, reference

_NAME = "layer_norm_gradients"


def _fake(
    grad_output: Tensor, residual: Tensor, x: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = (x.new_empty(x.shape[-1], dtype=accumulation_dtype(x)) for _ in range(2))
    grad_weight, grad_bias = sums
    return empty_output(x), empty_output(x), grad_weight, grad_bias


_extension.define(
    _NAME,
    fake=_fake,
    eager=eager.layer_norm_gradients,
    reference=reference.layer_norm_gradients,
    cuda=cuda.layer_norm_gradients,
)
_extension.forbid_gradients(_NAME, "torch.nn.functional.layer_norm")


def layer_norm_gradients(
    grad_output: Tensor,
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a backward pass needs of a norm whose input x goes on along a residual connection too.

    For layers that recompute their activations, in one pass over memory: the sum of both gradients
    of x, the norm ``output = LayerNorm(x)`` again, and the gradients of its parameters.

    Args:
        grad_output: gradient of ``LayerNorm(x)``, ``Tensor[B, H, W, D]``; converted to the dtype of
            ``x``, as ``residual`` is.
        residual: gradient that reaches x along the connection, ``Tensor[B, H, W, D]``.
        x: ``Tensor[B, H, W, D]``, normalized over D. All three are copied unless they are
            contiguous.
        weight, bias: of the norm, ``Tensor[D]``.
        eps: added to the variance.

    Returns:
        ``grad_x = residual + J^T grad_output``, where J is the Jacobian of the norm, and
        ``output``, two ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``x``; ``grad_weight``
        and ``grad_bias``, two ``Tensor[D]``. These are float32 (float64 for float64 ``x``), and so
        is all arithmetic.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: a gradient of the results is computed.
    """
    check_activation(_NAME, "x", x, "B H W D")
    shape, dim = tuple(x.shape), x.shape[-1]
    check_tensor(_NAME, "grad_output", grad_output, shape, "[B, H, W, D]")
    check_tensor(_NAME, "residual", residual, shape, "[B, H, W, D]")
    check_tensor(_NAME, "weight", weight, (dim,), "[D]")
    check_tensor(_NAME, "bias", bias, (dim,), "[D]")
    return torch.ops.spatial_mamba.layer_norm_gradients(grad_output, residual, x, weight, bias, eps)
