"""Training batches, and what becomes of broken images."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from spatial_mamba_d2.detection.data import build_train_loader, load_training_datasets


def take(loader, num_batches):
    return list(itertools.islice(loader, num_batches))


def build_loader(cfg):
    return build_train_loader(cfg, load_training_datasets(cfg))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_the_position_only(workers, make_cfg):
    """Whatever the workers and the state of the global generators."""
    batches = []
    for start in (0, 2):
        np.random.seed(start)
        loader = build_loader(make_cfg("DATALOADER.NUM_WORKERS", workers))
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
        return image["file_name"], build_loader(cfg)

    return build


def truncate(path):
    path.write_bytes(path.read_bytes()[:700])


def test_truncated_image_is_an_error_that_names_it(broken_loader):
    name, loader = broken_loader(truncate, "raise")
    with pytest.raises(ValueError, match=f"image file .*{name} cannot be decoded: .*truncated"):
        take(loader, len(loader.dataset))


def test_truncated_image_is_skipped_and_counted(broken_loader, caplog):
    name, loader = broken_loader(truncate, "skip")
    batches = take(loader, 2 * len(loader.dataset))
    assert not any(name in record["file_name"] for (record,) in batches)
    warnings = [r.getMessage() for r in caplog.records if "skipped broken sample" in r.getMessage()]
    assert len(warnings) == 1 and "no. 1" in warnings[0] and name in warnings[0]


def test_image_that_vanishes_during_training(broken_loader):
    name, loader = broken_loader(lambda path: None, "raise")
    for record in loader.dataset.items:
        if record["file_name"].endswith(name):
            record["file_name"] += ".gone"
    with pytest.raises(FileNotFoundError, match=f"no image file .*{name}.gone"):
        take(loader, len(loader.dataset))


def shrink(path):
    import cv2

    cv2.imwrite(str(path), cv2.imread(str(path))[:-3])


def test_image_of_another_size_is_found_before_training(broken_loader):
    with pytest.raises(ValueError, match=r"wrong image size: 1\n.* has height \d+ and width \d+"):
        broken_loader(shrink, "raise")


def test_image_that_changes_during_training(broken_loader):
    name, loader = broken_loader(lambda path: None, "raise")
    (path,) = {r["file_name"] for r in loader.dataset.items if r["file_name"].endswith(name)}
    shrink(path)
    with pytest.raises(ValueError, match=f"image file .*{name}: Mismatched image shape"):
        take(loader, len(loader.dataset))


def test_annotations_that_do_not_fit_are_no_broken_image(make_cfg, shapes):
    """A fault of configuration must not be skipped, image by image."""
    cfg = make_cfg("DATASETS.ON_ERROR", "skip", "DATALOADER.NUM_WORKERS", 0)
    loader = build_loader(cfg)
    for record in loader.dataset.items:
        for annotation in record["annotations"]:
            annotation["segmentation"] = {"size": [1, 1], "counts": "1"}
    with pytest.raises(ValueError, match="annotations of image .*jpg: "):
        take(loader, 1)


def test_bgr_is_the_reverse_of_rgb(make_cfg):
    images = []
    for image_format in ("RGB", "BGR"):
        cfg = make_cfg("INPUT.FORMAT", image_format, "DATALOADER.NUM_WORKERS", 0)
        images.append(take(build_loader(cfg), 1)[0][0]["image"])
    assert torch.equal(images[0], images[1].flip(0))


def test_accumulation_sees_the_same_images(make_cfg):
    batches = []
    for accumulation_steps in (1, 2):
        words = ("SOLVER.ACCUMULATION_STEPS", accumulation_steps, "DATALOADER.NUM_WORKERS", 0)
        micro_batches = take(build_loader(make_cfg(*words)), 3 * accumulation_steps)
        batches.append([record for batch in micro_batches for record in batch])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["image"], other["image"])
