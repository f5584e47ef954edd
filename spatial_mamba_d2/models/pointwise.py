"""Linear layers over the channels of a map, by the fastest way that PyTorch has for the device.

On CPUs PyTorch hands linear layers to MKL and convolutions to oneDNN, which is twice as fast on
processors with AVX-512 that are not Intel's, and as fast on Intel's (``tools/benchmark.py`` prints
both rates). A linear layer over ``Tensor[B, H, W, C]`` is a 1x1 convolution of the same memory,
so that is how it is computed there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONEDNN_DTYPES = (torch.float32, torch.bfloat16) if torch.backends.mkldnn.is_available() else ()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of a map: ``Tensor[B, H, W, I]`` -> ``Tensor[B, H, W, O]``.

    Args:
        weight: ``Tensor[O, I]``.
        bias: ``Tensor[O]``.
    """
    if x.device.type != "cpu" or x.dtype not in _ONEDNN_DTYPES:
        return F.linear(x, weight, bias)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1)


class Pointwise(nn.Linear):
    """``torch.nn.Linear`` for maps: ``Tensor[B, H, W, I]`` -> ``Tensor[B, H, W, O]``."""

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linear layers with GELU between; ``Tensor[B, H, W, C]`` -> the same shape."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Pointwise(dim, hidden)
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.fc1(x))

    def leave(self, hidden: Tensor) -> Tensor:
        """What follows the first layer."""
        return self.fc2(F.gelu(hidden))
