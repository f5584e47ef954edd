"""States inside a block before and after fusion, as in the figures of Spatial-Mamba's paper.

They belong to the model's own computation: the arguments of its operator are recorded, and the two
steps that the operator takes in one pass are repeated one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_mamba_d2.explain.backbones import (
    build_model,
    check_results,
    normalize,
    read_square_images,
)
from spatial_mamba_d2.models.spatial_mamba import SpatialMamba
from spatial_mamba_d2.ops import selective_scan, state_fusion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

PANEL_INCH, DPI = 3, 100


@dataclass(frozen=True)
class States:
    """What happens in the state space model of one block.

    Attributes:
        step: step sizes, softplus of delta, ``Tensor[B, H, W, D]``.
        before: states h after the scan, before the fusion, ``Tensor[B, H, W, D]``.
        after: states h' after the fusion, ``Tensor[B, H, W, D]``.
        output: the operator's result, ``C h' + D u``, ``Tensor[B, H, W, D]``.
        observed: the same from :attr:`after`, which must equal it up to rounding.
    """

    step: Tensor
    before: Tensor
    after: Tensor
    output: Tensor
    observed: Tensor


class _Recorder(TorchDispatchMode):
    """Keeps arguments and output of one call of the structure-aware SSM."""

    def __init__(self, wanted: int):
        super().__init__()
        self.wanted, self.calls = wanted, 0
        self.inputs: tuple[Tensor, ...] = ()
        self.output: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operators = torch.ops.spatial_mamba
        from_dt = func is operators.structure_aware_ssm_from_dt.default
        if from_dt or func is operators.structure_aware_ssm.default:
            if self.calls == self.wanted:
                if from_dt:
                    u, dt, dt_weight, *others = args
                    args = u, torch.nn.functional.linear(dt, dt_weight), *others
                self.inputs, self.output = args, output
            self.calls += 1
        return output


@torch.no_grad()
def record_states(model: SpatialMamba, image: Tensor, stage: int, block: int) -> States:
    """States in block ``block`` (from 1) of stage ``stage`` (from 1), in eval mode.

    Args:
        image: normalised, ``Tensor[B, 3, H, W]``.

    Raises:
        ValueError: no such stage or block.
    """
    depths = [len(s.blocks) for s in model.stages]  # type: ignore[arg-type]
    if not 1 <= stage <= len(depths):
        raise ValueError(f"stage must be 1..{len(depths)}, got {stage}")
    if not 1 <= block <= depths[stage - 1]:
        raise ValueError(f"block must be 1..{depths[stage - 1]} in stage {stage}, got {block}")
    model.eval()
    recorder = _Recorder(sum(depths[: stage - 1]) + block - 1)
    with recorder:
        model.forward_stages(image, last=f"res{stage + 1}")
    assert recorder.output is not None  # every block makes one call
    u, delta, A, B, C, D, delta_bias, taps = recorder.inputs
    before = selective_scan(
        u.flatten(1, 2), delta.flatten(1, 2), A, B.flatten(1, 2), delta_bias
    ).view(u.shape)
    after = state_fusion(before, taps)
    return States(
        step=torch.nn.functional.softplus(delta + delta_bias),
        before=before,
        after=after,
        output=recorder.output,
        observed=C[..., None] * after + D * u,
    )


def draw_states(states: States, image: np.ndarray, channels: Sequence[int], title: str) -> Figure:
    """First row: the image and means over all channels; then a row for each of ``channels``.

    Args:
        states: states of one image.
        image: RGB, ``uint8[H, W, 3]``.

    Raises:
        ValueError: no such channel.
    """
    from matplotlib.figure import Figure

    width = states.before.shape[-1]
    if wrong := [c for c in channels if not 0 <= c < width]:
        raise ValueError(f"channels must be in 0..{width - 1}, got {wrong[0]}")
    maps: dict[str, Tensor] = {
        "step": states.step[0],
        "before fusion": states.before[0],
        "after fusion": states.after[0],
    }
    figure = Figure(
        figsize=(4 * PANEL_INCH, (1 + len(channels)) * PANEL_INCH), dpi=DPI, layout="constrained"
    )
    figure.suptitle(title)
    panels = figure.subplots(1 + len(channels), 4, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    panels[0, 0].imshow(image)
    panels[0, 0].set_title("image", fontsize="medium")
    for column, (name, values) in enumerate(maps.items(), start=1):
        panels[0, column].imshow(values.abs().mean(-1).cpu(), cmap="viridis")
        panels[0, column].set_title(f"|{name}|, mean over {width} channels", fontsize="medium")
        for row, channel in enumerate(channels, start=1):
            panels[row, column].imshow(values[..., channel].cpu(), cmap="viridis")
            panels[row, column].set_title(f"{name}, channel {channel}", fontsize="medium")
    return figure


def plot_states(
    model: str,
    weights: Path | None,
    inputs: Sequence[Path],
    output: Path,
    *,
    stage: int,
    block: int,
    channels: Sequence[int],
    num_images: int,
    size_px: int,
    seed: int,
    overwrite: bool = True,
) -> list[Path]:
    """Write ``states_{i}.png`` for each image to ``output``, and return their paths.

    Args:
        model, weights: see :func:`~.backbones.build_model`; the model must be one of ours.
        inputs, num_images, size_px: see :func:`~.backbones.read_square_images`.
        stage, block, channels: what to draw, see :func:`record_states` and :func:`draw_states`.
        seed: seed of random weights.
        overwrite: replace figures in ``output``; never an input.

    Raises:
        FileNotFoundError, ValueError: model, weights, images or the choice are unusable.
    """
    planned = [output / f"states_{i}.png" for i in range(num_images)]
    check_results(planned, inputs, [weights], overwrite=overwrite)
    torch.manual_seed(seed)
    network = build_model(model, weights, size_px)
    if not isinstance(network, SpatialMamba):
        raise ValueError(f"model must be one of spatial_mamba_*, which have states, got {model!r}")
    output.mkdir(parents=True, exist_ok=True)
    source = weights.name if weights else "RANDOM WEIGHTS"
    written = []
    for i, image in enumerate(read_square_images(inputs, num_images, size_px)):
        states = record_states(network, normalize(network, image)[None], stage, block)
        title = f"{model}, {source}, stage {stage}, block {block}"
        path = output / f"states_{i}.png"
        draw_states(states, image, channels, title).savefig(path)
        written.append(path)
    logger.info("%d figures in %s", len(written), output)
    return written
