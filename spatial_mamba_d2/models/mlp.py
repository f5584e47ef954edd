"""The multilayer perceptron of a block."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from spatial_mamba_d2.models.branches import Body, Weights
from spatial_mamba_d2.models.pointwise import Pointwise
from spatial_mamba_d2.models.recompute import recompute
from spatial_mamba_d2.ops import gelu_gradients


class GELU(nn.GELU):
    """``torch.nn.GELU`` whose output training computes again rather than keeps."""

    def forward(self, x: Tensor) -> Tensor:
        return recompute(F.gelu, x)


class Mlp(Body):
    """Two linear layers with GELU between; ``Tensor[B, H, W, C]`` -> the same shape."""

    first, last = "fc1", "fc2"
    kinds: ClassVar = {"fc1": Pointwise, "act": GELU, "fc2": Pointwise}
    weights = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Pointwise(dim, hidden)
        self.act = GELU()
        self.fc2 = Pointwise(hidden, dim)

    def inner(self, h: Tensor, derived: Weights) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.act(h), ()

    def inner_gradients(
        self, grad: Tensor, h: Tensor, kept: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        grad_h, output, grad_bias = gelu_gradients(grad, h)
        return grad_h, output, {"fc1.bias": grad_bias}
