"""Which sample comes when, whatever the number of processes, and what becomes of broken ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spatial_mamba_d2.data.samplers import ResumableBatchSampler, SampleIndex, SkippingDataset

GROUPS = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0]


def take(sampler, num_batches):
    return list(itertools.islice(sampler, num_batches))


def collect(num_items, batch, iterations, world_size=1, **kwargs):
    """The samples of each iteration, over all processes and micro-batches, in order."""
    accumulation_steps = kwargs.get("accumulation_steps", 1)
    batches = [
        list(
            ResumableBatchSampler(
                num_items,
                batch,
                num_iterations=iterations,
                rank=rank,
                world_size=world_size,
                **kwargs,
            )
        )
        for rank in range(world_size)
    ]
    return [
        [sample for rank in batches for part in rank[i : i + accumulation_steps] for sample in part]
        for i in range(0, len(batches[0]), accumulation_steps)
    ]


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 0, 1, 1, 0]], ids=["one group", "two groups"])
def test_the_stream_is_the_same_for_any_processes_and_start(groups):
    options = {"seed": 5, "groups": groups}
    expected = collect(7, 12, 10, **options)
    assert collect(7, 12, 10, world_size=3, **options) == expected
    assert collect(7, 12, 10, world_size=2, accumulation_steps=3, **options) == expected
    assert collect(7, 12, 10, start=6, **options) == expected[6:]
    assert collect(7, 12, 10, seed=6, groups=groups) != expected
    assert len({sample.position for batch in expected for sample in batch}) == 120


def test_every_pass_has_every_item_once():
    batches = take(ResumableBatchSampler(11, 1, seed=3), 33)
    for epoch in range(3):
        indices = [batch[0].item for batch in batches[11 * epoch : 11 * (epoch + 1)]]
        assert sorted(indices) == list(range(11))
    assert [batch[0].position for batch in batches] == list(range(33))


def test_a_batch_is_of_one_group():
    for batch in take(ResumableBatchSampler(11, 4, groups=GROUPS, seed=3), 20):
        assert len({GROUPS[sample.item] for sample in batch}) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_can_be_entered_anywhere(seed):
    """Data sets, batches and groups at random, among them groups smaller than a batch."""
    rng = np.random.default_rng(seed)
    num_items, batch_size = int(rng.integers(1, 30)), int(rng.integers(1, 9))
    groups = rng.integers(0, rng.integers(1, 4), num_items).tolist()
    whole = take(ResumableBatchSampler(num_items, batch_size, groups=groups), 60)
    for start in (0, 1, 5, 13, 37, 59):
        entered = ResumableBatchSampler(num_items, batch_size, groups=groups, start=start)
        assert take(entered, 60 - start) == whole[start:]


def test_the_length():
    sampler = ResumableBatchSampler(7, 12, num_iterations=10, accumulation_steps=3, start=6)
    assert len(sampler) == 30  # of the whole run, as Lightning counts
    with pytest.raises(TypeError, match="endless"):
        len(ResumableBatchSampler(7, 12))


def test_nothing_is_left_after_the_end():
    assert list(ResumableBatchSampler(7, 12, num_iterations=10, start=11)) == []


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="num_items must be at least 1, got 0"):
        ResumableBatchSampler(0, 2)


def test_a_batch_must_divide():
    with pytest.raises(ValueError, match="IMS_PER_BATCH must be a multiple of 2 processes x 3"):
        ResumableBatchSampler(7, 8, world_size=2, accumulation_steps=3)


def read_even(item):
    if item % 2:
        raise ValueError(f"item {item} is broken")
    return (item,)


def test_a_broken_sample_is_an_error_or_the_next_one_is_used(caplog):
    def transform(item, rng):
        return item, rng.random()

    def build(items, on_error):
        return SkippingDataset(items, read_even, transform, seed=0, on_error=on_error)

    strict, lenient = build(range(4), "raise"), build(range(4), "skip")
    assert strict[SampleIndex(2, 7)][0] == 2
    with pytest.raises(ValueError, match="item 1 is broken"):
        strict[SampleIndex(1, 8)]
    assert lenient[SampleIndex(2, 7)] == strict[SampleIndex(2, 7)]
    used = [lenient[SampleIndex(index, 0)][0] for index in (0, 1, 2, 3, 1)]
    assert used == [0, 2, 2, 0, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"skipped broken sample no. {n}: item {i} is broken" for n, i in ((1, 1), (2, 3))
    ]
    with pytest.raises(ValueError, match="all 2 training samples are broken"):
        build([1, 3], "skip")[SampleIndex(0, 0)]


def test_a_fault_of_the_transform_is_never_skipped():
    def transform(item, rng):
        raise ValueError("no broken file")

    dataset = SkippingDataset(range(4), read_even, transform, seed=0, on_error="skip")
    with pytest.raises(ValueError, match="no broken file"):
        dataset[SampleIndex(0, 0)]
