"""The 25 distinct taps of three 3x3 kernels with dilations 1, 3 and 5 that share their centre."""

from __future__ import annotations

import torch
from torch import Tensor

DILATIONS = (1, 3, 5)
RADIUS = 5  # reach of the most dilated kernel, in tokens
_CENTRE = 4  # index of the centre in a row-major 3x3 kernel
_RING = [i for i in range(9) if i != _CENTRE]

#: (dy, dx) of each tap: the 3x3 of dilation 1 row by row, then the rings of dilations 3 and 5.
OFFSETS: tuple[tuple[int, int], ...] = tuple(
    (d * (i // 3 - 1), d * (i % 3 - 1)) for d in DILATIONS for i in (range(9) if d == 1 else _RING)
)
TAPS = len(OFFSETS)


def merge_taps(kernel_d1: Tensor, kernel_d3: Tensor, kernel_d5: Tensor, alpha: Tensor) -> Tensor:
    """Weighted sum of the three kernels as distinct taps; differentiable.

    Args:
        kernel_d1, kernel_d3, kernel_d5: depthwise kernels, ``Tensor[D, 1, 3, 3]``.
        alpha: weights of the kernels, ``Tensor[3]``.

    Returns:
        ``Tensor[25, D]`` in the order of :data:`OFFSETS`.

    Raises:
        ValueError: a shape does not fit.
    """
    if alpha.shape != (3,):
        raise ValueError(f"merge_taps: alpha must be [3], got {list(alpha.shape)}")
    for name, kernel in (("d1", kernel_d1), ("d3", kernel_d3), ("d5", kernel_d5)):
        if kernel.shape != (kernel_d1.shape[0], 1, 3, 3):
            raise ValueError(
                f"merge_taps: kernel_{name} must be [D, 1, 3, 3] with one D for all three, "
                f"got {list(kernel.shape)}"
            )
    stacked = torch.stack((kernel_d1, kernel_d3, kernel_d5)).flatten(2)  # [3, D, 9]
    weighted = (alpha.view(3, 1, 1) * stacked).transpose(1, 2)  # [3, 9, D]
    before, centre, after = weighted.split([4, 1, 4], dim=1)  # [3, 4, D], [3, 1, D], [3, 4, D]
    # Not by indices, whose gradients are maps of zeros each, and their sums.
    (before1, before3, before5), (after1, after3, after5) = before.unbind(), after.unbind()
    return torch.cat([before1, centre.sum(0), after1, before3, after3, before5, after5])


def split_taps(taps: Tensor) -> list[Tensor]:
    """Depthwise kernels ``Tensor[D, 1, 3, 3]`` per dilation that sum to ``taps``.

    The shared centre goes to dilation 1; the other two kernels have a zero there.
    """
    dim = taps.shape[1]
    kernels = []
    for block in taps.split((9, 8, 8)):
        if len(block) == 8:
            block = torch.cat((block[:_CENTRE], torch.zeros_like(block[:1]), block[_CENTRE:]))
        kernels.append(block.t().reshape(dim, 1, 3, 3))
    return kernels


def join_taps(kernels: list[Tensor]) -> Tensor:
    """The inverse of :func:`split_taps`, ``Tensor[25, D]``; ignores the rings' centres."""
    inner, ring3, ring5 = (k.flatten(1).t() for k in kernels)
    rings = [torch.cat((r[:_CENTRE], r[_CENTRE + 1 :])) for r in (ring3, ring5)]
    return torch.cat((inner, *rings))
