"""Which samples come when, the same for every number of processes, and resumable anywhere."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from spatial_mamba_d2.data.faults import Item, OnError, read_or_skip
from spatial_mamba_d2.system.seeding import derive_seed

logger = logging.getLogger(__name__)


def check_batch_size(batch_size: int, world_size: int, accumulation_steps: int) -> None:
    """Raises ValueError if the processes cannot have equally many images in each micro-batch."""
    if batch_size < 1 or batch_size % (world_size * accumulation_steps):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of {world_size} processes x "
            f"{accumulation_steps} SOLVER.ACCUMULATION_STEPS, got {batch_size}"
        )


class SampleIndex(NamedTuple):
    """The index of an item, and its position in the stream, which seeds its augmentation."""

    item: int
    position: int


class ResumableBatchSampler(Sampler[list[SampleIndex]]):
    """A stream of batches that starts at any iteration and divides among any processes.

    The items are shuffled again for each pass. A batch holds items of one group, so that padding is
    small if wide and tall images are different groups. Each process takes its share of every
    batch, in as many micro-batches as there are accumulation steps.

    Args:
        num_items: size of the data set.
        batch_size: items of an iteration, over all processes and accumulation steps.
        groups: for each item, the group it may share a batch with; ``None``: all are one.
        num_iterations: length of the run; ``None``: endless.
        accumulation_steps: micro-batches of an iteration.
        seed: determines the order.
        start: iterations that are done already; may be set until iteration begins.
        rank, world_size: this process, and how many there are.

    Raises:
        ValueError: there is no item, or the batch cannot be divided so.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        groups: Sequence[int] | None = None,
        num_iterations: int | None = None,
        accumulation_steps: int = 1,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if num_items < 1:
            raise ValueError(f"num_items must be at least 1, got {num_items}")
        check_batch_size(batch_size, world_size, accumulation_steps)
        self.groups = np.zeros(num_items, int) if groups is None else np.asarray(groups)
        self.batch_size, self.num_iterations = batch_size, num_iterations
        self.accumulation_steps, self.seed, self.start = accumulation_steps, seed, start
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        if self.num_iterations is None:
            raise TypeError("the stream of batches is endless and has no length")
        return self.num_iterations * self.accumulation_steps

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        per_rank = self.batch_size // self.world_size
        first = self.rank * per_rank
        micro_batch = per_rank // self.accumulation_steps
        remaining = None
        if self.num_iterations is not None:
            remaining = max(0, self.num_iterations - self.start)
        for batch in itertools.islice(self._batches(), remaining):
            for begin in range(first, first + per_rank, micro_batch):
                yield batch[begin : begin + micro_batch]

    def _batches(self) -> Iterator[list[SampleIndex]]:
        """All processes' batches from iteration ``start`` on.

        An item waits until its group has enough for a batch. How many wait at the end of a pass,
        and how many batches there were, follows from the sizes of the groups. So the stream is
        entered a few passes before ``start``, from where on all that wait at ``start`` are known.
        """
        sizes = dict(zip(*np.unique(self.groups, return_counts=True), strict=True))
        num_items, size = len(self.groups), self.batch_size
        # After this many passes no more than `start` batches are complete ...
        reached = self.start * size // num_items
        # ... and the passes from here on hold all that wait then.
        waiting_then = {group: reached * n % size for group, n in sizes.items()}
        back = max(-(-waiting_then[group] // n) for group, n in sizes.items())
        entry = max(0, reached - back)

        unknown = SampleIndex(-1, -1)  # from before the entry; all in batches before `start`
        waiting = {group: [unknown] * (entry * n % size) for group, n in sizes.items()}
        complete = sum(entry * n // size for n in sizes.values())
        for epoch in itertools.count(entry):
            shuffle = np.random.default_rng(derive_seed(self.seed, "shuffle", epoch))
            order = shuffle.permutation(num_items)
            for place, index in enumerate(order.tolist()):
                batch = waiting[self.groups[index]]
                batch.append(SampleIndex(index, epoch * num_items + place))
                if len(batch) == size:
                    if complete >= self.start:
                        yield batch.copy()
                    complete += 1
                    batch.clear()


class SkippingDataset(Dataset[Any], Generic[Item]):
    """Training samples by :class:`SampleIndex`; a broken item is an error, or the next one is used.

    Args:
        items: what names the samples.
        read: item -> arguments of ``transform`` before the generator; raises ``OSError`` or
            ``ValueError`` if a file is broken.
        transform: those and a ``numpy.random.Generator`` -> sample.
        seed: determines the augmentations.
        on_error: about broken items, ``"raise"`` or ``"skip"``.
    """

    def __init__(
        self,
        items: Sequence[Item],
        read: Callable[[Item], tuple[Any, ...]],
        transform: Callable[..., Any],
        *,
        seed: int,
        on_error: OnError,
    ):
        self.items = items
        self.read = read
        self.transform = transform
        self.seed = seed
        self.on_error = on_error
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, sample: SampleIndex) -> Any:
        rng = np.random.default_rng(derive_seed(self.seed, "augmentation", sample.position))
        for offset in range(len(self.items)):
            index = (sample.item + offset) % len(self.items)
            content, error = read_or_skip(self.read, self.items[index], self.on_error)
            if error is None:
                return self.transform(*content, rng)
            if index not in self.broken:
                self.broken.add(index)
                logger.warning("skipped broken sample no. %d: %s", len(self.broken), error)
        raise ValueError(f"all {len(self.items)} training samples are broken")
