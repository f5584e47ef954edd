"""Winograd's algorithm F(4x4, 3x3) as matrices, and the weights that the operator takes.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308. The points of
interpolation are 0, +-sqrt(1/2), +-sqrt(2) and infinity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TILE, PATCH = 4, 6  # sides of a tile of outputs, and of the inputs that it depends on
PANEL = 16  # output channels that the compiled kernels read together; they read two panels
_NEAR, _FAR = math.sqrt(0.5), math.sqrt(2)
_POINTS = (0.0, _NEAR, -_NEAR, _FAR, -_FAR)

#: ``B^T``: from six inputs to six factors
INPUTS = (
    (1.0, 0.0, -2.5, 0.0, 1.0, 0.0),
    (0.0, -2 * _NEAR, -2.0, _NEAR, 1.0, 0.0),
    (0.0, 2 * _NEAR, -2.0, -_NEAR, 1.0, 0.0),
    (0.0, -_FAR / 2, -0.5, _FAR, 1.0, 0.0),
    (0.0, _FAR / 2, -0.5, -_FAR, 1.0, 0.0),
    (0.0, 1.0, 0.0, -2.5, 0.0, 1.0),
)
#: ``A^T``: from six products to four outputs
OUTPUTS = tuple(
    (*(point**power for point in _POINTS), float(power == TILE - 1)) for power in range(TILE)
)


def _kernel_matrix() -> Tensor:
    """``G``, from three weights to six factors: ``float64[6, 3]``."""
    rows = []
    for point in _POINTS:
        scale = math.prod(point - other for other in _POINTS if other != point)
        rows.append([point**power / scale for power in range(3)])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def winograd_weight(weight: Tensor) -> Tensor:
    """The weight of a convolution as :func:`winograd_conv3x3` takes it; computed in float64.

    Args:
        weight: ``Tensor[O, C, 3, 3]``.

    Returns:
        ``Tensor[36, P, C, 16]`` in the dtype of ``weight``: output channel ``16 p + i`` is at
        ``[:, p, :, i]``. P is even; channels above O are 0.
    """
    matrix = _kernel_matrix().to(weight.device)
    factors = torch.einsum("ix,ocxy,jy->ijoc", matrix, weight.double(), matrix).flatten(0, 1)
    num_outputs, num_inputs = weight.shape[:2]
    factors = F.pad(factors, (0, 0, 0, -num_outputs % (2 * PANEL)))
    panels = factors.view(PATCH**2, -1, PANEL, num_inputs).transpose(2, 3)
    return panels.to(weight.dtype).contiguous()


def unpacked(weight: Tensor, num_outputs: int) -> Tensor:
    """Factors ``Tensor[36, C, O]`` from ``Tensor[36, P, C, 16]``."""
    return weight.transpose(1, 2).flatten(2)[:, :, :num_outputs]


def patches(x: Tensor) -> Tensor:
    """Inputs of all tiles: ``Tensor[B, H, W, C]`` -> ``Tensor[6, 6, tiles, C]``."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 1, 1 + -width % TILE, 1, 1 + -height % TILE))
    tiles = x.unfold(1, PATCH, TILE).unfold(2, PATCH, TILE)  # [B, h, w, C, 6, 6]
    return tiles.permute(4, 5, 0, 1, 2, 3).flatten(2, 4)


def assembled(tiles: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The inverse for outputs: ``Tensor[4, 4, tiles, O]`` -> ``Tensor[B, H, W, O]``.

    Args:
        size: B, H, W.
    """
    batch, height, width = size
    rows, columns = -(-height // TILE), -(-width // TILE)
    maps = tiles.view(TILE, TILE, batch, rows, columns, tiles.shape[3]).permute(2, 3, 0, 4, 1, 5)
    maps = maps.flatten(3, 4).flatten(1, 2)
    return maps[:, :height, :width].contiguous()


def to_factors(patch: Tensor) -> Tensor:
    """``B^T d B``: ``Tensor[6, 6, tiles, C]`` -> ``Tensor[36, tiles, C]``."""
    return _both_ways(patch.new_tensor(INPUTS), patch).flatten(0, 1)


def tile_outputs(products: Tensor) -> Tensor:
    """``A^T M A``: ``Tensor[36, tiles, O]`` -> ``Tensor[4, 4, tiles, O]``."""
    return _both_ways(products.new_tensor(OUTPUTS), products.unflatten(0, (PATCH, PATCH)))


def _both_ways(matrix: Tensor, x: Tensor) -> Tensor:
    """``M x M^T``: ``Tensor[a, b], Tensor[b, b, ...]`` -> ``Tensor[a, a, ...]``."""
    for _ in range(2):
        rows = (matrix @ x.flatten(1)).view(len(matrix), *x.shape[1:])
        x = rows.transpose(0, 1)
    return x
