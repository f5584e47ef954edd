"""Images for Lightning: training as a stream that can resume anywhere, each test image once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Generic

import lightning
from torch.utils.data import DataLoader, Dataset

from spatial_mamba_d2.data.faults import Item, OnError
from spatial_mamba_d2.data.pixel_statistics import statistics_as_keys
from spatial_mamba_d2.data.pixels import PixelRange
from spatial_mamba_d2.data.samplers import ResumableBatchSampler, SkippingDataset
from spatial_mamba_d2.system.workers import worker_options


class DataModule(lightning.LightningDataModule, Generic[Item]):
    """Training and test images for the trainer; subclasses say what they are.

    The length of the training is the trainer's ``max_steps``.

    Args:
        root, train, test: the folder, and the names of its splits; ``test`` may be "" for training.
        batch_size: images of an iteration, over all processes and accumulation steps.
        accumulation_steps: micro-batches of an iteration.
        test_batch_size: images that are evaluated together; None: one, without a batch axis.
        seed: of order and augmentations.
        num_workers: processes that load images, for each training process.
        on_error: about unusable files. One that only turns out to be broken when it is read is
            skipped and counted then.

    Attributes:
        check_decode: whether ``setup`` also decodes every image.
        num_channels, value_range: see :func:`~.images.read_image`.

    Raises:
        FileNotFoundError, ValueError: from ``setup``: a split is not usable.
    """

    check_decode = False
    num_channels = 3
    value_range: PixelRange | None = None

    def __init__(
        self,
        root: str | Path,
        train: str,
        test: str,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        test_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        on_error: OnError = "raise",
    ):
        super().__init__()
        self.root, self.train, self.test = Path(root), train, test
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        self.test_batch_size = test_batch_size
        self.seed, self.num_workers, self.on_error = seed, num_workers, on_error
        self.splits: dict[str, list[Item]] = {}

    def load_split(self, split: str) -> list[Item]:
        """The usable items of a split."""
        raise NotImplementedError

    def image_file(self, item: Item) -> Path:
        raise NotImplementedError

    def training_samples(self, items: list[Item]) -> SkippingDataset[Item]:
        raise NotImplementedError

    def test_samples(self, items: list[Item]) -> Dataset[Any]:
        raise NotImplementedError

    def check(self) -> list[str]:
        """Check all that a training would read, and decode every image.

        Returns:
            a line for each split, and one about the pixels of the one that trains.

        Raises:
            FileNotFoundError, ValueError: a split is not usable.
        """
        self.check_decode = True
        self.setup("fit")
        files = [self.image_file(item) for item in self.splits[self.train]]
        return [
            *(f"{self.root}, {split}: {len(items)} images" for split, items in self.splits.items()),
            statistics_as_keys(files, self.num_channels, self.value_range),
        ]

    def setup(self, stage: str) -> None:
        if stage != "fit" and not self.test:
            raise ValueError("DATASETS.TEST must name a split to evaluate, got ''")
        for split in (self.train, self.test) if stage == "fit" else (self.test,):
            if split and split not in self.splits:
                self.splits[split] = self.load_split(split)
        if not self.test:
            return
        _, world_size = self._rank_and_world_size()
        if len(self.splits[self.test]) < world_size:
            raise ValueError(
                f"{self.root}, {self.test}: must have at least one image for each of the "
                f"{world_size} processes, got {len(self.splits[self.test])}"
            )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._rank_and_world_size()
        items = self.splits[self.train]
        sampler = ResumableBatchSampler(
            len(items),
            self.batch_size,
            num_iterations=self.trainer.max_steps if self.trainer else None,
            accumulation_steps=self.accumulation_steps,
            seed=self.seed,
            start=self.trainer.global_step if self.trainer else 0,
            rank=rank,
            world_size=world_size,
        )
        samples = self.training_samples(items)
        return DataLoader(samples, batch_sampler=sampler, **worker_options(self.num_workers))

    def val_dataloader(self) -> DataLoader:
        """Each image in exactly one process; the processes' shares may differ by one."""
        if not self.test:
            return DataLoader([])  # type: ignore[arg-type]  # a list is enough of a data set
        rank, world_size = self._rank_and_world_size()
        images = self.test_samples(self.splits[self.test])
        return DataLoader(
            images,
            batch_size=self.test_batch_size,
            sampler=range(rank, len(self.splits[self.test]), world_size),
            **worker_options(self.num_workers),
        )
