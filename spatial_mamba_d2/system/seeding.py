"""Seeds that depend on where a run is, not on what it did before: the reason why resuming is exact.

Every random event of a training (a shuffle, an augmentation, the dropout of an iteration) has a
seed of its own, derived here from the run's seed, the purpose, and the event's counters.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A seed in ``[0, 2**32)`` for one event; NumPy's ``SeedSequence`` mixes all the bits.

    Args:
        seed: of the run, at least 0.
        purpose: keeps events of different kinds with equal counters apart.
        counters: what numbers the event: iteration and rank, or the position of a sample.
    """
    entropy = (seed, zlib.crc32(purpose.encode()), *counters)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch; ``seed`` is in ``[0, 2**32)``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global generators of the CPU that start at ``seed``, and are restored at the end.

    For augmentations of libraries, which draw from Python's, NumPy's or PyTorch's. Generators of
    GPUs are left alone.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
