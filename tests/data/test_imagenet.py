"""Reading and checking class folders; each way in which a data set is wrong."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image

from spatial_mamba_d2.data.imagenet import (
    ClassifiedImage,
    TrainTransform,
    build_test_transform,
    check_split,
    load_classes,
    load_split,
    read_sample,
)
from spatial_mamba_d2.data.images import open_image
from spatial_mamba_d2.data.pixels import PixelRange

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OPTIONS = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel"}
TRAIN = TrainTransform(24, MEAN, STD, OPTIONS)


@pytest.fixture
def tree(tmp_path):
    """train: 3 of bird, 2 of cat; val: 1 of cat; sizes, modes and suffixes vary."""
    rng = np.random.default_rng(0)
    for name, size, mode in (
        ("train/bird/a.JPEG", (40, 30), "RGB"),
        ("train/bird/b.png", (31, 57), "RGBA"),
        ("train/bird/c.jpg", (40, 40), "L"),
        ("train/cat/a.jpg", (33, 33), "RGB"),
        ("train/cat/deeper/b.webp", (64, 32), "RGB"),
        ("val/cat/x.bmp", (40, 30), "RGB"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    (tmp_path / "train/notes.txt").write_text("no class")
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def test_a_split_in_the_order_of_its_classes(tree, caplog):
    classes = load_classes("", tree, "train", 2)
    assert classes == ("bird", "cat")
    samples = load_split(tree, "train", classes)
    names = [(p.path.relative_to(tree / "train").as_posix(), p.target) for p in samples]
    assert names == [("bird/a.JPEG", 0), ("bird/b.png", 0), ("bird/c.jpg", 0), ("cat/a.jpg", 1),
                     ("cat/deeper/b.webp", 1)]  # fmt: skip
    assert all(read_sample(sample)[0].mode == "RGB" for sample in samples)
    assert not caplog.records
    assert [p.target for p in load_split(tree, "val", classes)] == [1]
    assert "val: 1 of 2 classes have no image" in caplog.text


def test_class_names_from_elsewhere(tree):
    (tree / "names.txt").write_text("cat\nbird\n\nfish\n")
    classes = load_classes("names.txt", tree, "train", 3)
    assert classes == ("cat", "bird", "fish")
    assert [p.target for p in load_split(tree, "train", classes)] == [1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="NUM_CLASSES must be 3, .*names.txt.*, got 1000"):
        load_classes("names.txt", tree, "train", 1000)
    with pytest.raises(FileNotFoundError, match="DATASETS.CLASSES: no such file: .*absent.txt"):
        load_classes("absent.txt", tree, "train", 2)
    imagenet = load_classes("imagenet-1k", tree, "train", 1000)
    # By the table of imagenet_mini, and the order of the folders.
    assert [imagenet.index(name) for name in ("n01440764", "n02102040", "n03888257")] == [
        0,
        217,
        701,
    ]
    assert list(imagenet) == sorted(imagenet)


def test_litter_links_and_stray_images(tree, caplog):
    """What systems leave is no class and no image; images outside of class folders are named."""
    for name in ("__MACOSX/bird", "@eaDir", ".ipynb_checkpoints", "bird/__MACOSX"):
        (tree / "train" / name).mkdir(parents=True)
    for name in ("__MACOSX/x.jpg", "bird/._a.JPEG", "bird/__MACOSX/a.jpg", "stray.jpg"):
        (tree / "train" / name).write_bytes(b"")
    (tree / "train/cat/gone.jpg").symlink_to("nowhere.jpg")
    assert load_classes("", tree, "train", 2) == ("bird", "cat")
    with pytest.raises(ValueError, match="(?s)problems found: 1.*gone.jpg"):
        load_split(tree, "train", ("bird", "cat"), check_decode=True)
    checked = check_split(tree, "train", ("bird", "cat"), on_error="skip", check_decode=True)
    assert len(checked.samples) == 5 and sum(checked.left_out.values()) == 1
    assert "in no class folder: 1 images, the first: " in caplog.text
    with pytest.raises(ValueError, match="train/bird must have a folder for each class, got none"):
        (tree / "train/bird/__MACOSX/a.jpg").unlink()
        load_classes("", tree, "train/bird", 2)


def test_faults_are_named_together_or_left_out(tree, caplog):
    (tree / "train/empty").mkdir()
    (tree / "train/fish").mkdir()
    truncate(tree / "train/cat/a.jpg")
    classes = ("bird", "cat", "empty")
    with pytest.raises(ValueError, match="(?s)problems found: 3.*empty holds no image"):
        load_split(tree, "train", classes, check_decode=True)
    with pytest.raises(ValueError, match="(?s)problems found: 2.*fish is none of the 3 classes"):
        load_split(tree, "train", classes)
    left = load_split(tree, "train", classes, on_error="skip", check_decode=True)
    assert len(left) == 4 and "skipped because of empty class: 1" in caplog.text
    with pytest.raises(
        ValueError, match="(?s)nothing is usable.*folder .*bird is none of the 1 classes"
    ):
        load_split(tree, "train", ("fox",), on_error="skip")
    with pytest.raises(FileNotFoundError, match="DATASETS.ROOT: no such folder: /.*absent"):
        load_split(tree, "absent", classes)
    with pytest.raises(ValueError, match="on_error must be .raise. or .skip., got 'ignore'"):
        load_split(tree, "train", classes, on_error="ignore")


def test_orientation_is_left_alone_as_the_authors_do(tmp_path):
    image = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a right angle
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_sample(ClassifiedImage(tmp_path / "turned.jpg", 3))[0].size == (40, 20)


def test_evaluation_resizes_bicubically_and_crops_the_centre(tree):
    image = open_image(tree / "train/bird/a.JPEG")  # 40 x 30
    actual = build_test_transform(36, 24, MEAN, STD)(image)
    resized = image.resize((48, 36), Image.Resampling.BICUBIC)
    crop = np.asarray(resized.crop((12, 6, 36, 30)), np.float64) / 255
    expected = torch.from_numpy((crop - MEAN) / STD).permute(2, 0, 1).float()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_the_middle_of_a_line_of_pixels_is_evaluated(turned):
    pixels = np.zeros((8, 9000, 3), np.uint8)
    pixels[:, 4000:5000] = 255  # white between black ends
    image = Image.fromarray(np.swapaxes(pixels, 0, 1) if turned else pixels)
    transform = build_test_transform(36, 24, (0, 0, 0), (1, 1, 1))
    assert (transform(image) == torch.ones(3, 24, 24)).all()
    assert max(transform.transforms[0](image).size) == 50 * 8  # what is resized


def test_litter_of_operating_systems_is_no_image(tree):
    classes = load_classes("", tree, "train", 2)
    before = load_split(tree, "train", classes, on_error="skip")
    for name in (".DS_Store", "Thumbs.db", "._a.JPEG", ".cache/b.JPEG", "__MACOSX/a.JPEG"):
        path = tree / "train/bird" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert load_split(tree, "train", classes, on_error="skip", check_decode=True) == before


def test_a_training_sample_depends_on_its_seed_alone(tree):
    image = open_image(tree / "train/bird/a.JPEG")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = TRAIN(image, 3, np.random.default_rng(5))
    assert states[0] == random.getstate() and torch.equal(states[2], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    torch.rand(3), np.random.rand(3), random.random()
    again = TRAIN(image, 3, np.random.default_rng(5))
    assert first[1] == 3 and first[0].shape == (3, 24, 24) and torch.equal(first[0], again[0])
    samples = {TRAIN(image, 3, np.random.default_rng(i))[0].sum().item() for i in range(20)}
    assert len(samples) == 20


def test_every_strength_of_every_operation_runs(tree):
    """Also posterising to 0 bits, which new versions of Pillow refuse."""
    image = open_image(tree / "train/bird/a.JPEG")
    transform = TrainTransform(24, MEAN, STD, {"auto_augment": "rand-m10-inc1"})
    (augment,) = (step for step in transform._transform.transforms if hasattr(step, "ops"))
    names = {operation.name for operation in augment.ops}
    assert len(names) == len(augment.ops) and "PosterizeIncreasing" in names
    for operation in augment.ops:
        operation.prob = 1.0
        for magnitude in (0, 5, 9, 10):
            operation.magnitude = magnitude
            result = operation(image)
            assert result.size == image.size
            if operation.name == "PosterizeIncreasing" and magnitude == 10:
                assert not np.asarray(result).any()


def test_real_images(imagenet_mini, caplog):
    caplog.set_level(logging.WARNING)
    classes = load_classes("imagenet-1k", imagenet_mini, "train", 1000)
    samples = load_split(imagenet_mini, "train", classes, check_decode=True)
    assert len(samples) == 200 and {p.target for p in samples} >= {0, 217, 482, 701}
    assert "990 of 1000 classes have no image" in caplog.text


def test_linked_folders_and_dark_files_of_16_bits(tmp_path):
    for path in ("train/bird/a.png", "elsewhere/b.JPEG"):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(tmp_path / path)
    (tmp_path / "train/bird/more").symlink_to(tmp_path / "elsewhere")
    samples = load_split(tmp_path, "train", ["bird"])
    assert [sample.path.name for sample in samples] == ["a.png", "b.JPEG"]
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "train/bird/c.png")
    with pytest.raises(ValueError, match=r"c\.png has 16 bits of which it uses 0\.\.4095 only"):
        load_split(tmp_path, "train", ["bird"])
    kwargs = {"value_range": PixelRange(0, 4095)}
    assert len(load_split(tmp_path, "train", ["bird"], **kwargs)) == 3
