"""``spatial_mamba::add_bias_``: definition, documentation, argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops._checks import check_activation, check_tensor
from spatial_mamba_d2.ops.add_bias import cuda, eager, reference

_NAME = "add_bias_"
_extension.define(
    _NAME,
    fake=lambda *_: None,
    eager=eager.add_bias_,
    reference=reference.add_bias_,
    cuda=cuda.add_bias_,
    by_design=("cpu",),  # oneDNN's convolutions do it there
)
_extension.forbid_gradients(_NAME, "torch.add and torch.nn.functional.relu")


def add_bias_(x: Tensor, bias: Tensor, residual: Tensor | None = None, relu: bool = False) -> None:
    """What follows a convolution, in one pass and in place; for inference only.

    ``x <- x + bias + residual``, then ReLU. cuDNN's convolutions take no bias, and PyTorch adds it
    in a pass of its own.

    Args:
        x: ``Tensor[B, H, W, D]``; fast if it is contiguous.
        bias: ``Tensor[D]``.
        residual: ``Tensor[B, H, W, D]`` in the dtype of ``x``, or None.
        relu: see above.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: gradients are recorded.
    """
    check_activation(_NAME, "x", x, "B H W D")
    check_tensor(_NAME, "bias", bias, (x.shape[3],), "[D]")
    if residual is not None:
        check_tensor(_NAME, "residual", residual, tuple(x.shape), "[B, H, W, D]")
    torch.ops.spatial_mamba.add_bias_(x, bias, residual, relu)
