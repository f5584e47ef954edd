"""``spatial_mamba::gelu_gradients``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops._precision import accumulation_dtype, empty_output
from spatial_mamba_d2.ops.gelu_gradients import cuda, eager, reference

_NAME = "gelu_gradients"


def _fake(grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_sum = x.new_empty(x.shape[-1], dtype=accumulation_dtype(x))
    return empty_output(x), empty_output(x), grad_sum


_extension.define(
    _NAME,
    fake=_fake,
    eager=eager.gelu_gradients,
    reference=reference.gelu_gradients,
    cuda=cuda.gelu_gradients,
)
_extension.forbid_gradients(_NAME, "torch.nn.functional.gelu")


def gelu_gradients(grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward pass needs of ``output = gelu(x)``, in one pass over memory.

    For layers that recompute their activations, where x is the output of a linear layer: the
    gradient of x, GELU again, which the gradient of the next layer's weight needs, and the gradient
    of the bias inside x. GELU is the exact one, by the error function.

    Args:
        grad_output: gradient of ``gelu(x)``, ``Tensor[B, H, W, D]``; converted to the dtype of
            ``x``.
        x: ``Tensor[B, H, W, D]``. Both are copied unless they are contiguous.

    Returns:
        ``grad_x`` and ``output``, two ``Tensor[B, H, W, D]``, contiguous, in the dtype of ``x``;
        ``grad_sum``, the sum of ``grad_x`` over all tokens, ``Tensor[D]``. It is float32 (float64
        for float64 ``x``), and so is all arithmetic.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: a gradient of the results is computed.
    """
    check_activation(_NAME, "x", x, "B H W D")
    check_tensor(_NAME, "grad_output", grad_output, tuple(x.shape), "[B, H, W, D]")
    return torch.ops.spatial_mamba.gelu_gradients(grad_output, x)
