"""The convolution as nine shifted multiply-adds: the truth that kernels are tested against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import precise


def _shifted(x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """``i, j, x[y + i - 1, x + j - 1]`` for the nine taps, with zeros around the map."""
    height, width = x.shape[1:3]
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            yield i, j, padded[:, i : i + height, j : j + width]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for i, j, value in _shifted(x):
        total = total + weight[:, 0, i, j] * value
    return total


def depthwise_conv3x3(x: Tensor, weight: Tensor, bias: Tensor, residual: bool) -> Tensor:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3`."""
    x_, weight, bias = precise(x, weight, bias)
    conv = _convolve(x_, weight) + bias
    out = x_ + conv if residual else conv * torch.sigmoid(conv)
    return out.to(x.dtype)


def depthwise_conv3x3_gradients_(
    grad_x: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`spatial_mamba_d2.ops.depthwise_conv3x3_gradients_`."""
    x_, grad, weight_, bias_ = precise(x, grad_output, weight, bias)
    conv = _convolve(x_, weight_) + bias_
    gate = torch.sigmoid(conv)
    grad_conv = grad if residual else grad * gate * (1 + conv * (1 - gate))
    # The output at y + 1 - i, x + 1 - j reads x[y, x] with weight i, j.
    of_x = _convolve(grad_conv, weight_.flip(2, 3))
    grad_x.copy_(of_x + grad if residual else of_x)
    sums = [(grad_conv * value).sum(dim=(0, 1, 2)) for _, _, value in _shifted(x_)]
    grad_weight = torch.stack(sums, -1).reshape(weight.shape)
    return grad_weight.to(weight.dtype), grad_conv.sum(dim=(0, 1, 2)).to(bias.dtype)
