"""Images for Lightning: training as a stream that can resume anywhere, each test image once.

The data modules of segmentation and classification are :class:`StreamedData`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import lightning
import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from spatial_mamba_d2.system.workers import worker_options

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
Item = TypeVar("Item")  # what names a sample: a pair of files, a file and its class

Draw = tuple[int, int]  # index of a pair, and the seed of its augmentation


class TrainingStream(Sampler[list[Draw]]):
    """The batches of a whole training run, the same for every number of processes.

    The pairs are shuffled anew for each pass. Each process takes its part of every batch, in
    ``parts`` turns. The stream can start at any iteration, so that resumed training sees what
    an uninterrupted one would.

    Args:
        size: number of pairs.
        batch_size: of an iteration, over all processes and parts.
        iterations: of the whole run; the length is ``iterations * parts``.
        start: the iterations that are already done.

    Raises:
        ValueError: the batch cannot be divided so.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        iterations: int,
        *,
        seed: int = 0,
        parts: int = 1,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or batch_size % (world_size * parts):
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of {world_size} processes x {parts} "
                f"SOLVER.ACCUMULATION_STEPS, got {batch_size}"
            )
        self.size, self.batch_size, self.iterations, self.seed = size, batch_size, iterations, seed
        self.parts, self.start, self.rank, self.world_size = parts, start, rank, world_size

    def __len__(self) -> int:
        return self.iterations * self.parts

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.batch_size // self.world_size
        micro = share // self.parts
        order, known_pass = np.empty(0, int), -1
        for iteration in range(self.start, self.iterations):
            first = iteration * self.batch_size + self.rank * share
            draws = []
            for position in range(first, first + share):
                number, place = divmod(position, self.size)
                if number != known_pass:
                    order = np.random.default_rng([self.seed, number]).permutation(self.size)
                    known_pass = number
                draws.append((int(order[place]), position))
            for part in range(self.parts):
                yield draws[part * micro : (part + 1) * micro]


class TrainingSamples(Dataset[Any], Generic[Item]):
    """Maps draws to samples; a broken item is an error, or the next one serves.

    Args:
        read: item -> arguments of ``transform`` before the generator; raises ``OSError`` or
            ``ValueError`` where a file is broken.
        transform: those, and the draw's generator -> sample.
    """

    def __init__(
        self,
        items: Sequence[Item],
        read: Callable[[Item], tuple[Any, ...]],
        transform: Callable[..., Any],
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

    def __getitem__(self, draw: Draw) -> Any:
        index, position = draw
        rng = np.random.default_rng([self.seed, position])
        for offset in range(len(self.items)):
            place = (index + offset) % len(self.items)
            try:
                content = self.read(self.items[place])
            except (OSError, ValueError) as error:
                if self.on_error == "raise":
                    raise
                if place not in self.broken:
                    self.broken.add(place)
                    logger.warning("skipped broken sample no. %d: %s", len(self.broken), error)
                continue
            return self.transform(*content, rng)
        raise ValueError(f"all {len(self.items)} training samples are broken")


class StreamedData(lightning.LightningDataModule, Generic[Item]):
    """Training and test images for the trainer; subclasses say what they are.

    Args:
        root, train, test: the folder, and the names of its splits.
        batch_size: of an iteration, over all processes and parts.
        parts: into which each process divides its share of a batch.
        test_batch_size: images that are evaluated together; None: one, without a batch axis.
        seed: of order and augmentations.
        workers: processes that load, for each training process.
        on_error: about unusable files. One that only turns out to be broken when it is read is
            skipped and counted then.

    Raises:
        FileNotFoundError, ValueError: from ``setup``: a split is not usable.
    """

    def __init__(
        self,
        root: str | Path,
        train: str,
        test: str,
        *,
        batch_size: int,
        parts: int = 1,
        test_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 0,
        on_error: OnError = "raise",
    ):
        super().__init__()
        self.root, self.train, self.test = Path(root), train, test
        self.batch_size, self.parts, self.test_batch_size = batch_size, parts, test_batch_size
        self.seed, self.workers, self.on_error = seed, workers, on_error
        self.splits: dict[str, list[Item]] = {}

    def load_split(self, split: str) -> list[Item]:
        """The usable items of a split."""
        raise NotImplementedError

    def iterations(self) -> int:
        """Of the whole training."""
        raise NotImplementedError

    def training_samples(self, items: list[Item]) -> TrainingSamples[Item]:
        raise NotImplementedError

    def test_samples(self, items: list[Item]) -> Dataset[Any]:
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        for split in (self.train, self.test) if stage == "fit" else (self.test,):
            if split not in self.splits:
                self.splits[split] = self.load_split(split)
        _, world_size = self._place()
        if len(self.splits[self.test]) < world_size:
            raise ValueError(
                f"{self.root}, {self.test}: must have at least one image for each of the "
                f"{world_size} processes, got {len(self.splits[self.test])}"
            )

    def _place(self) -> tuple[int, int]:
        """Rank and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._place()
        items = self.splits[self.train]
        stream = TrainingStream(
            len(items),
            self.batch_size,
            self.iterations(),
            seed=self.seed,
            parts=self.parts,
            start=self.trainer.global_step if self.trainer else 0,
            rank=rank,
            world_size=world_size,
        )
        samples = self.training_samples(items)
        return DataLoader(samples, batch_sampler=stream, **worker_options(self.workers))

    def val_dataloader(self) -> DataLoader:
        """Each image in exactly one process; the processes' shares may differ by one."""
        rank, world_size = self._place()
        images = self.test_samples(self.splits[self.test])
        return DataLoader(
            images,
            batch_size=self.test_batch_size,
            sampler=range(rank, len(self.splits[self.test]), world_size),
            **worker_options(self.workers),
        )
