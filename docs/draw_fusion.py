#!/usr/bin/env python3
"""Draw what reaches a state by the scan, and by scan and fusion: ``docs/fusion.png``.

    python docs/draw_fusion.py

The figure shows the operators of this package, which are called as the model calls them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spatial_mamba_d2.ops import merge_taps, selective_scan, state_fusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 15  # of the map, in tokens
STEP = 0.06  # of the scan: from token to token, a state keeps exp(-STEP) of itself
LARGE = "#c44e52"


def weights_at_centre(side: int = SIDE, step: float = STEP) -> tuple[Tensor, Tensor]:
    """How much of each token is in the state at the centre, before and after the fusion.

    Every token has the same step and the fusion's three kernels weigh all of their taps equally, so
    that the order of the scan and the places of the taps are all that is seen.

    Returns:
        two ``Tensor[side, side]``.
    """
    tokens = torch.zeros(1, side * side, 1, requires_grad=True)
    delta = torch.full_like(tokens, step).expm1().log().detach()  # the scan applies softplus
    states = selective_scan(
        tokens, delta, -torch.ones(1), torch.ones(1, side * side), torch.zeros(1)
    ).view(1, side, side, 1)
    kernel = torch.full((1, 1, 3, 3), 1 / 9)
    fused = state_fusion(states, merge_taps(kernel, kernel, kernel, torch.full((3,), 1 / 3)))
    middle = side // 2
    before, after = (
        torch.autograd.grad(x[0, middle, middle, 0], tokens, retain_graph=True)[0] / step
        for x in (states, fused)
    )
    return before.view(side, side), after.view(side, side)


def draw() -> Figure:
    """The order of the scan with the fusion's taps, and :func:`weights_at_centre`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.7), dpi=80, layout="constrained")
    order, *panels = figure.subplots(1, 3)
    middle = SIDE // 2
    for row in range(SIDE):
        order.annotate(
            "", (SIDE - 0.6, row), (-0.4, row),
            arrowprops={"arrowstyle": "->", "color": "0.6", "linewidth": 0.8},
        )  # fmt: skip
    for dilation, marker in ((1, "o"), (3, "s"), (5, "^")):
        places = [middle - dilation, middle, middle + dilation]
        xy = [(x, y) for y in places for x in places if (x, y) != (middle, middle)]
        order.scatter(*zip(*xy, strict=True), s=26, marker=marker, label=f"dilation {dilation}")
    order.scatter(middle, middle, s=60, marker="*", color=LARGE, label="the state")
    order.set(xlim=(-0.7, SIDE - 0.3), ylim=(SIDE - 0.3, -0.7), aspect="equal")
    order.set_title("order of the scan, and 25 taps", fontsize="medium")
    order.legend(
        fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, frameon=False,
        columnspacing=0.8, handletextpad=0.1,
    )  # fmt: skip
    names = ("weights after the scan", "weights after the fusion")
    for panel, name, weights in zip(panels, names, weights_at_centre(), strict=True):
        shown = panel.imshow(weights, cmap="viridis", vmin=0)
        panel.scatter(middle, middle, s=60, marker="*", color=LARGE)
        panel.set_title(name, fontsize="medium")
        figure.colorbar(shown, ax=panel, shrink=0.7)
    for panel in (order, *panels):
        panel.set(xticks=[], yticks=[])
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("fusion.png"))
