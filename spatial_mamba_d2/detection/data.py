"""Batches for training and testing that do not depend on the number of processes or a restart."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from spatial_mamba_d2.detection.augmentation import build_augmentation
from spatial_mamba_d2.detection.datasets import Record, load_records
from spatial_mamba_d2.system.workers import single_thread_opencv, worker_options

Draw = tuple[int, int]  # index of a record, and the seed of its augmentation
logger = logging.getLogger(__name__)


class BatchStream(Sampler[list[Draw]]):
    """An endless stream of batches, the same for every number of processes.

    The records are shuffled anew for each pass. A batch holds wide images or tall ones, when
    ``groups`` says which is which, so that padding is small; each process takes its part of it.
    The stream can start at any iteration: resumed training sees what an uninterrupted one would.

    Args:
        groups: for each record, the group it may share a batch with.
        batch_size: of all processes together.
        seed: of the order and of the augmentations.
        start: the first iteration to produce; may be set until iteration begins.
    """

    def __init__(self, groups: list[int], batch_size: int, seed: int, start: int = 0):
        world_size = comm.get_world_size()
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be a multiple of the {world_size} processes, "
                f"got {batch_size}"
            )
        self.groups = groups
        self.batch_size = batch_size
        self.seed = seed
        self.start = start

    def _draws(self) -> Iterator[Draw]:
        position = itertools.count()
        for epoch in itertools.count():
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
            for index in order.tolist():
                yield index, (self.seed * 1_000_003 + next(position)) % 2**32

    def _batches(self) -> Iterator[list[Draw]]:
        waiting: dict[int, list[Draw]] = {group: [] for group in self.groups}
        for draw in self._draws():
            batch = waiting[self.groups[draw[0]]]
            batch.append(draw)
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()

    def __iter__(self) -> Iterator[list[Draw]]:
        part = self.batch_size // comm.get_world_size()
        first = comm.get_rank() * part
        for batch in itertools.islice(self._batches(), self.start, None):
            yield batch[first : first + part]


class TrainingImages(Dataset[dict[str, Any]]):
    """Maps draws to model inputs; a broken image is an error, or skipped for the next one."""

    def __init__(self, records: list[Record], mapper: Callable[[Record], Any], skip_broken: bool):
        self.records = records
        self.mapper = mapper
        self.skip_broken = skip_broken
        self.broken: set[str] = set()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        index, seed = draw
        np.random.seed(seed)  # Detectron2's augmentations use the global generators
        random.seed(seed)
        for offset in range(len(self.records)):
            record = self.records[(index + offset) % len(self.records)]
            try:
                return self.mapper(record)
            except ValueError as error:
                if not self.skip_broken:
                    raise
                if record["file_name"] not in self.broken:
                    self.broken.add(record["file_name"])
                    logger.warning("skipped broken image no. %d: %s", len(self.broken), error)
        raise ValueError(f"all {len(self.records)} training images are broken")


class Mapper:
    """Detectron2's ``DatasetMapper`` with our augmentation; errors name the image.

    Raises:
        FileNotFoundError: the image is missing.
        ValueError: it is truncated, no image, of another size than its record says, or its
            annotations do not fit ``INPUT.MASK_FORMAT``.
    """

    def __init__(self, cfg: CfgNode, is_train: bool):
        self._map = DatasetMapper(
            is_train,
            augmentations=build_augmentation(cfg, is_train),
            image_format=cfg.INPUT.FORMAT,
            use_instance_mask=cfg.MODEL.MASK_ON,
            instance_mask_format=cfg.INPUT.MASK_FORMAT,
        )

    def __call__(self, record: Record) -> dict[str, Any]:
        try:
            return self._map(record)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"image is missing: {record['file_name']}") from error
        except (OSError, SyntaxError, ValueError, SizeMismatchError) as error:
            raise ValueError(f"cannot use image {record['file_name']}: {error}") from error


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """Endless batches of ``IMS_PER_BATCH`` over the processes, as lists of Detectron2 inputs.

    Raises:
        FileNotFoundError, ValueError: see :func:`~.datasets.load_records`.
    """
    records = [r for name in cfg.DATASETS.TRAIN for r in load_records(cfg, name, is_train=True)]
    if not records:
        raise ValueError("DATASETS.TRAIN must name at least one data set, got none")
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = [int(r["width"] > r["height"]) for r in records]
    else:
        groups = [0] * len(records)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return DataLoader(
        TrainingImages(records, Mapper(cfg, is_train=True), cfg.DATASETS.ON_ERROR == "skip"),
        batch_sampler=BatchStream(groups, cfg.SOLVER.IMS_PER_BATCH, seed),
        collate_fn=trivial_batch_collator,
        **worker_options(cfg.DATALOADER.NUM_WORKERS),
    )


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """The images of a test set, one at a time, split over the processes."""
    records = load_records(cfg, name, is_train=False)
    single_thread_opencv()
    return build_detection_test_loader(
        records, mapper=Mapper(cfg, is_train=False), num_workers=cfg.DATALOADER.NUM_WORKERS
    )
