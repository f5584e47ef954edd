"""The gradient, GELU and the sum by PyTorch's own operators, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spatial_mamba_d2.ops._precision import accumulation_dtype


def gelu_gradients(grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.gelu_gradients`."""
    x_ = x.contiguous()
    grad = grad_output.to(x.dtype).contiguous()
    grad_x = torch.ops.aten.gelu_backward(grad, x_)
    return grad_x, F.gelu(x_), grad_x.sum(dim=(0, 1, 2), dtype=accumulation_dtype(x))
