"""Drawings of images of any shape: large enough to be seen, small enough to be kept."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_mamba_d2.data.drawing import LONGEST_PX, as_rgb, enlarge, enlargement, widen

SHAPES = [(1, 3000), (3000, 1), (8, 2400), (1, 1), (2, 3), (5000, 40), (3, 100_000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_side_is_enlarged_beyond_the_bound(shape):
    for shortest_px in (240, 480):
        factor = enlargement(np.empty((*shape, 3), np.uint8), shortest_px)
        assert factor >= 1
        assert max(shape) * factor <= max(LONGEST_PX, *shape) * (1 + 1e-9)
        enough = min(shape) * factor >= shortest_px * (1 - 1e-9)
        assert enough or max(shape) * factor >= LONGEST_PX * (1 - 1e-9)


def test_usual_images_are_enlarged_to_their_short_side():
    assert enlarge(np.zeros((60, 90, 3), np.uint8)).shape == (240, 360, 3)
    assert enlarge(np.zeros((300, 9000, 3), np.uint8)).shape == (300, 9000, 3)


def test_a_narrow_drawing_is_widened_with_white():
    image = np.zeros((5, 1, 3), np.uint8)
    wide = widen(image)
    assert wide.shape == (5, 240, 3) and not wide[:, :1].any() and (wide[:, 1:] == 255).all()
    image = np.zeros((5, 300, 3), np.uint8)
    assert widen(image).shape == image.shape


@pytest.mark.parametrize(("channels", "drawn"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_any_channels_can_be_drawn(channels, drawn):
    image = np.broadcast_to(np.arange(channels, dtype=np.uint8), (2, 3, channels))
    assert (as_rgb(image) == drawn).all()
