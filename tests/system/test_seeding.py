"""Seeds of events, and generators that are put back."""

from __future__ import annotations

import random

import numpy as np
import torch

from spatial_mamba_d2.system.seeding import derive_seed, seed_all, seeded


def test_every_event_has_a_seed_of_its_own():
    seeds = [
        derive_seed(seed, purpose, iteration, rank)
        for seed in range(4)
        for purpose in ("step", "augmentation")
        for iteration in range(50)
        for rank in range(4)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derive_seed(3, "step", 5, 0) == derive_seed(3, "step", 5, 0)


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_seeded_block_leaves_no_trace():
    seed_all(1)
    expected = draw()
    seed_all(1)
    with seeded(7):
        inside = draw()
    assert draw() == expected
    with seeded(7):
        assert draw() == inside != expected
