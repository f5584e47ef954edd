"""Which sample comes when, whatever the number of processes, and what becomes of broken ones."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed")

from spatial_mamba_d2.data.stream import TrainingSamples, TrainingStream


def collect(size, batch, iterations, world_size=1, **kwargs):
    """The draws of each iteration, over all processes and parts, in order."""
    streams = [
        TrainingStream(size, batch, iterations, rank=rank, world_size=world_size, **kwargs)
        for rank in range(world_size)
    ]
    parts = kwargs.get("parts", 1)
    batches = [list(stream) for stream in streams]
    return [
        [draw for rank in batches for part in rank[i : i + parts] for draw in part]
        for i in range(0, len(batches[0]), parts)
    ]


def test_the_stream_is_the_same_for_any_processes_and_start():
    expected = collect(7, 12, 10, seed=5)
    assert collect(7, 12, 10, world_size=3, seed=5) == expected
    assert collect(7, 12, 10, world_size=2, parts=3, seed=5) == expected
    assert collect(7, 12, 10, seed=5, start=6) == expected[6:]
    assert collect(7, 12, 10, seed=6) != expected
    indices = [index for batch in expected for index, _ in batch]
    assert all(sorted(indices[i : i + 7]) == list(range(7)) for i in range(0, 105, 7))
    assert len({seed for batch in expected for _, seed in batch}) == 120
    assert len(TrainingStream(7, 12, 10, parts=3, start=6)) == 30


def test_a_batch_must_divide():
    with pytest.raises(ValueError, match="IMS_PER_BATCH must be a multiple of 2 processes x 3"):
        TrainingStream(7, 8, 10, world_size=2, parts=3)


def read_even(item):
    if item % 2:
        raise ValueError(f"item {item} is broken")
    return (item,)


def test_a_broken_sample_is_an_error_or_the_next_one_serves(caplog):
    def transform(item, rng):
        return item, rng.random()

    strict = TrainingSamples(range(4), read_even, transform, 0, "raise")
    assert strict[(2, 7)][0] == 2
    with pytest.raises(ValueError, match="item 1 is broken"):
        strict[(1, 8)]
    lenient = TrainingSamples(range(4), read_even, transform, 0, "skip")
    assert lenient[(2, 7)] == strict[(2, 7)]
    assert [lenient[(index, 0)][0] for index in (0, 1, 2, 3, 1)] == [0, 2, 2, 0, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"skipped broken sample no. {n}: item {i} is broken" for n, i in ((1, 1), (2, 3))
    ]
    hopeless = TrainingSamples([1, 3], read_even, transform, 0, "skip")
    with pytest.raises(ValueError, match="all 2 training samples are broken"):
        hopeless[(0, 0)]
