"""Label maps from windows, against one that is computed with all probabilities in the memory."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_mamba_d2.prediction import Predictor
from spatial_mamba_d2.prediction.blending import Blender
from spatial_mamba_d2.prediction.windows import Grid


def expected(grid: Grid, probabilities: dict[int, np.ndarray], num_classes: int) -> np.ndarray:
    total = np.zeros((num_classes, *grid.size))
    for index, values in probabilities.items():
        rows, columns = grid.ramps(grid[index])
        y, x = grid[index].slices
        total[:, y, x] += values * rows[:, None] * columns
    label = total.argmax(0).astype(np.uint8)
    label[total.sum(0) == 0] = 255
    return label


@pytest.mark.parametrize("size", [(150, 190), (64, 130), (70, 60), (97, 96)])
@pytest.mark.parametrize("absent", [(), (0,), (1, 2)])
def test_strips_equal_the_mean_of_all_windows(size, absent):
    rng = np.random.default_rng(0)
    grid = Grid(size, 64, 20)
    probabilities = {
        i: rng.random((4, *window.size)).astype(np.float16).astype(np.float32)
        for i, window in enumerate(grid)
        if i not in absent
    }
    blender = Blender(grid, 4)
    packed = {i: blender.pack(i, values) for i, values in probabilities.items()}
    strips = list(blender.strips(packed.get))
    assert [start for start, _ in strips] == [0, *np.cumsum([len(s) for _, s in strips])[:-1]]
    label = np.concatenate([strip for _, strip in strips])
    assert np.array_equal(label, expected(grid, probabilities, 4))


def test_an_oracle_gives_the_label_map_of_the_scene(scene, oracle):
    label = Predictor(oracle("segmentation"))(scene.image, window_px=200, overlap_px=40).label
    assert np.array_equal(label, scene.numbers % 3)


def test_each_window_is_predicted_once(scene, oracle):
    model = oracle("segmentation")
    calls = []
    probabilities = model.probabilities
    model.probabilities = lambda images: calls.extend(images) or probabilities(images)
    Predictor(model)(scene.image, window_px=200, overlap_px=40)
    assert len(calls) == len(Grid(scene.numbers.shape, 200, 40))
