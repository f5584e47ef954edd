"""The stream of batches, and what becomes of broken images."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from spatial_mamba_d2.detection.data import (
    BatchStream,
    Mapper,
    TrainingImages,
    build_train_loader,
)

GROUPS = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0]


def take(stream, number):
    return list(itertools.islice(stream, number))


def test_every_pass_has_every_record_once_and_batches_of_one_group():
    batches = take(BatchStream([0] * 11, 1, seed=3), 33)
    for epoch in range(3):
        indices = [batch[0][0] for batch in batches[11 * epoch : 11 * (epoch + 1)]]
        assert sorted(indices) == list(range(11))
    seeds = [batch[0][1] for batch in batches]
    assert len(set(seeds)) == len(seeds)
    for batch in take(BatchStream(GROUPS, 4, seed=3), 20):
        assert len({GROUPS[index] for index, _ in batch}) == 1


def test_resuming_gives_the_same_batches():
    whole = take(BatchStream(GROUPS, 2, seed=0), 30)
    assert take(BatchStream(GROUPS, 2, seed=0, start=13), 17) == whole[13:]
    assert take(BatchStream(GROUPS, 2, seed=1), 30) != whole


def test_processes_share_each_batch(monkeypatch):
    whole = take(BatchStream(GROUPS, 4, seed=0), 9)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(take(BatchStream(GROUPS, 4, seed=0), 9))
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="must be a multiple of the 2 processes, got 3"):
        BatchStream(GROUPS, 3, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_the_position_only(workers, make_cfg):
    """Whatever the workers and the state of the global generators."""
    batches = []
    for start in (0, 2):
        np.random.seed(start)
        loader = build_train_loader(make_cfg("DATALOADER.NUM_WORKERS", workers))
        loader.batch_sampler.start = start
        batches.append(take(loader, 4 - start))
    for first, second in zip(batches[0][2:], batches[1], strict=True):
        for a, b in zip(first, second, strict=True):
            assert a["file_name"] == b["file_name"]
            assert torch.equal(a["image"], b["image"])


@pytest.fixture
def broken_loader(make_cfg, shapes, tmp_path):
    """``broken_loader(damage, ON_ERROR)``: the training loader over one damaged image."""

    def build(damage, on_error, *more):
        folder = tmp_path / "images"
        shutil.copytree(shapes / "images/training", folder)
        content = json.loads((shapes / "instances_train.json").read_text())
        with_objects = {a["image_id"] for a in content["annotations"] if not a["iscrowd"]}
        image = next(i for i in content["images"] if i["id"] in with_objects)
        damage(folder / image["file_name"])
        cfg = make_cfg(
            "DATASETS.TRAIN_IMAGES", folder, "DATASETS.ON_ERROR", on_error,
            "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 1,
            "DATALOADER.ASPECT_RATIO_GROUPING", False, *more,
        )  # fmt: skip
        return image["file_name"], build_train_loader(cfg)

    return build


def truncate(path):
    path.write_bytes(path.read_bytes()[:700])


def test_truncated_image_is_an_error_that_names_it(broken_loader):
    name, loader = broken_loader(truncate, "raise")
    with pytest.raises(ValueError, match=f"cannot use image .*{name}: .*truncated"):
        take(loader, len(loader.dataset))


def test_truncated_image_is_skipped_and_counted(broken_loader, caplog):
    name, loader = broken_loader(truncate, "skip")
    batches = take(loader, 2 * len(loader.dataset))
    assert not any(name in record["file_name"] for (record,) in batches)
    warnings = [r.getMessage() for r in caplog.records if "skipped broken image" in r.getMessage()]
    assert len(warnings) == 1 and "no. 1" in warnings[0] and name in warnings[0]


def test_image_that_vanishes_during_training(broken_loader):
    name, loader = broken_loader(lambda path: None, "raise")
    for record in loader.dataset.records:
        if record["file_name"].endswith(name):
            record["file_name"] += ".gone"
    with pytest.raises(FileNotFoundError, match=f"image is missing: .*{name}.gone"):
        take(loader, len(loader.dataset))


def test_image_of_another_size(broken_loader):
    def shrink(path):
        import cv2

        cv2.imwrite(str(path), cv2.imread(str(path))[:-3])

    name, loader = broken_loader(shrink, "raise")
    with pytest.raises(ValueError, match=f"cannot use image .*{name}: Mismatched image shape"):
        take(loader, len(loader.dataset))


def test_all_images_broken(make_cfg, tmp_path):
    records = [{"file_name": str(tmp_path / f"{i}.jpg"), "annotations": []} for i in range(3)]
    for record in records:
        (tmp_path / record["file_name"]).write_bytes(b"no image")
    dataset = TrainingImages(records, Mapper(make_cfg(), is_train=True), skip_broken=True)
    with pytest.raises(ValueError, match="all 3 training images are broken"):
        dataset[0, 0]
