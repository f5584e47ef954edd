"""Reading, checking and transforming segmentation data; each way in which a data set is wrong."""

from __future__ import annotations

import errno
import importlib.util
import os
import zipfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from spatial_mamba_d2.data import ade20k_classes, label_maps
from spatial_mamba_d2.data.ade20k import find_pairs, load_classes, load_split, unpack
from spatial_mamba_d2.data.class_indices import IGNORE
from spatial_mamba_d2.data.label_format import LabelFormat
from spatial_mamba_d2.data.label_maps import read_label, read_pair
from spatial_mamba_d2.data.samplers import SampleIndex, SkippingDataset
from spatial_mamba_d2.data.segmentation_transforms import (
    TestTransform,
    TrainTransform,
    fitted_size,
    photometric_distortion,
    random_crop_origin,
    resize_image,
)
from spatial_mamba_d2.data.shapes import SEMANTIC_NAMES, generate_shapes

LABELS = LabelFormat(3)
MEAN_STD = {"mean": (127.0, 127.0, 127.0), "std": (64.0, 64.0, 64.0)}
TRAIN = TrainTransform(32, 64, (0.5, 2.0), 24, 0.75, flip=True, photometric=True, **MEAN_STD)


def write_pair(root, split, name, image=None, label=None):
    rng = np.random.default_rng(len(name))
    image = rng.integers(0, 256, (40, 50, 3), np.uint8) if image is None else image
    label = rng.integers(0, 4, (40, 50), np.uint8) if label is None else label
    for kind, suffix, pixels in (("images", "jpg", image), ("annotations", "png", label)):
        path = root / kind / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), pixels)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two training pairs and one for validation, of classes 1..3, 0 ignored."""
    root = tmp_path / "tree"
    for split, name in (("training", "a"), ("training", "bb"), ("validation", "ccc")):
        write_pair(root, split, name)
    return root


def test_classes_of_ade20k(root):
    assert len(ade20k_classes.NAMES) == len(ade20k_classes.PALETTE) == 150
    assert len(set(ade20k_classes.NAMES)) == 150
    assert ade20k_classes.NAMES[0] == "wall" and ade20k_classes.NAMES[149] == "flag"
    assert ade20k_classes.PALETTE[0] == (120, 120, 120) and ade20k_classes.PALETTE[149] == (
        92,
        0,
        255,
    )
    table = root.parent / "shared/data/ade20k_mini/ADEChallengeData2016"
    if table.is_dir():
        assert load_classes("objectInfo150.txt", table, 150).names == ade20k_classes.NAMES


def test_classes_of_other_data(tmp_path):
    (tmp_path / "names.txt").write_text("sky\ntree, plant\n\n")
    assert load_classes("names.txt", tmp_path, 2).names == ("sky", "tree, plant")
    assert load_classes("", tmp_path, 2).names == ("class 0", "class 1")
    with pytest.raises(ValueError, match="NUM_CLASSES must be 2, .*'names.txt', got 3"):
        load_classes("names.txt", tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="DATASETS.CLASSES: no such file: .*other.txt"):
        load_classes("other.txt", tmp_path, 3)


def test_label_formats():
    stored = np.array([[0, 1, 3]])
    assert LabelFormat(3).to_indices(stored).tolist() == [[IGNORE, 0, 2]]
    assert LabelFormat(4, 0, ()).to_indices(stored).tolist() == [[0, 1, 3]]
    cityscapes = LabelFormat(19, 0, (255,))
    assert cityscapes.to_indices(np.array([[0, 18, 255]])).tolist() == [[0, 18, IGNORE]]
    assert LabelFormat(2, 1, (0, 255)).to_indices(np.array([[0, 255, 2]])).tolist() == [
        [IGNORE, IGNORE, 1]
    ]


@pytest.mark.parametrize(
    ("labels", "stored", "message"),
    [
        (LabelFormat(150), 255, "label 255 is impossible: .*1..150.*the offset is 0"),
        (LabelFormat(150, 0, (255,)), 150, "label 150 is impossible: .*0..149.*the offset is 1"),
        (LabelFormat(3), 7, r"label 7 is impossible: classes are 1\.\.3 \(DATASETS.LABEL_OFFSET 1"),
    ],
    ids=["labels already reduced", "labels not reduced", "unknown class"],
)
def test_off_by_one_labels_are_explained(labels, stored, message):
    with pytest.raises(ValueError, match=message):
        labels.to_indices(np.array([[1, stored]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((65536,), r"num_classes must be 2\.\.65535 .*got 65536"),
        ((3, 1, (3,)), r"IGNORE_LABELS must be none of the classes' labels 1\.\.3, got 3"),
    ],
)
def test_bad_formats_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LabelFormat(*arguments)


def test_a_valid_tree(tree):
    pairs = load_split(tree, "training", LABELS, check_decode=True)
    assert [pair.image.stem for pair in pairs] == ["a", "bb"]
    image, label = read_pair(pairs[0], LABELS)
    stored = read_label(pairs[0].label)
    assert image.shape == (40, 50, 3) and set(np.unique(label)) == {0, 1, 2, IGNORE}
    assert np.array_equal(label == IGNORE, stored == 0)
    assert np.array_equal(label[stored > 0], stored[stored > 0] - 1)


FAULTS = {
    "label of an unknown class": (
        lambda root: write_pair(root, "training", "bb", label=np.full((40, 50), 4, np.uint8)),
        r"bb.png: label 4 is impossible",
    ),
    "RGB label": (
        lambda root: write_pair(root, "training", "bb", label=np.ones((40, 50, 3), np.uint8)),
        "bb.png has channels RGB that are equal: save one of them",
    ),
    "wrong size": (
        lambda root: write_pair(root, "training", "bb", label=np.ones((50, 40), np.uint8)),
        "bb.png is 50x40, its image is 40x50",
    ),
    "no label": (
        lambda root: (root / "annotations/training/bb.png").unlink(),
        "bb.jpg: no .*annotations/training/bb.png",
    ),
    "no image": (
        lambda root: (root / "images/training/bb.jpg").unlink(),
        "bb.png: no image bb in",
    ),
    "truncated label": (lambda root: truncate(root / "annotations/training/bb.png"), "bb.png"),
    "no image at all": (
        lambda root: (root / "images/training/bb.jpg").write_bytes(b"<html>"),
        "image file .*bb.jpg",
    ),
}


def training_images(pairs, seed, on_error):
    read = partial(read_pair, labels=LABELS)
    return SkippingDataset(pairs, read, TRAIN, seed=seed, on_error=on_error)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_or_skipped(name, tree, caplog):
    spoil, message = FAULTS[name]
    spoil(tree)
    with pytest.raises(ValueError, match=f"(?s)problems found: 1.*{message}"):
        load_split(tree, "training", LABELS)
    pairs = load_split(tree, "training", LABELS, on_error="skip")
    assert [pair.image.stem for pair in pairs] == ["a"]
    assert ": 1, the first: " in caplog.text


def test_a_truncated_image_shows_when_decoded(tree):
    truncate(tree / "images/training/bb.jpg")
    assert len(load_split(tree, "training", LABELS)) == 2  # its header is intact
    with pytest.raises(ValueError, match="bb.jpg cannot be decoded.*truncated"):
        load_split(tree, "training", LABELS, check_decode=True)
    pairs, _ = find_pairs(tree, "training")
    with pytest.raises(ValueError, match="bb.jpg"):
        training_images(pairs, 0, "raise")[SampleIndex(1, 0)]
    skipping = training_images(pairs, 0, "skip")
    expected = skipping[SampleIndex(0, 0)]
    assert all(map(torch.equal, skipping[SampleIndex(1, 0)], expected))
    assert skipping.broken == {1}
    truncate(tree / "images/training/a.jpg")
    with pytest.raises(ValueError, match="all 2 training samples are broken"):
        skipping[SampleIndex(0, 0)]


def test_empty_and_absent_folders(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="DATASETS.ROOT: no such folder: /.*images/test"):
        load_split(tree, "test", LABELS)
    for kind in ("images", "annotations"):
        (tree / kind / "test").mkdir()
    with pytest.raises(ValueError, match="nothing is usable"):
        load_split(tree, "test", LABELS)
    with pytest.raises(ValueError, match="on_error must be .raise. or .skip., got 'ignore'"):
        load_split(tree, "training", LABELS, on_error="ignore")


def test_many_faults_are_counted(tree):
    for i in range(14):
        write_pair(tree, "training", f"x{i}", label=np.full((40, 50), 9, np.uint8))
    with pytest.raises(ValueError, match="(?s)problems found: 14.*and 4 more$"):
        load_split(tree, "training", LABELS)


def test_generated_shapes_are_such_a_tree(tmp_path):
    root = generate_shapes(tmp_path / "shapes", num_train=2, num_val=1, image_px=(64, 64))
    classes = load_classes("objectInfo.txt", root, 6)
    assert classes.names == SEMANTIC_NAMES
    assert len(load_split(root, "training", LabelFormat(6), check_decode=True)) == 2


# Transforms


def test_sizes_are_those_of_the_recipe():
    assert fitted_size(250, 333, 512, 2048) == (512, 682)  # 681.98 to the nearest
    assert fitted_size(512, 683, 512, 2048) == (512, 683)
    assert fitted_size(100, 800, 512, 2048) == (256, 2048)  # the long side is the limit
    assert fitted_size(1, 5000, 512, 2048) == (1, 2048)


def test_resizing_equals_the_authors(root, golden):
    expected = golden("upernet_tiny.npz")
    image = cv2.imread(str(root / "tests/golden/image_b.png"))
    resized = resize_image(image, fitted_size(*image.shape[:2], 512, 2048))
    assert [3, *resized.shape[:2]] == expected["image_b.resized_shape"].tolist()
    sample = torch.from_numpy(resized.transpose(2, 0, 1)[:, ::37, ::41].copy())
    assert torch.equal(sample, expected["image_b.resized_uint8_sample"])


def test_a_sample_depends_on_its_seed_alone(tree):
    images = training_images(load_split(tree, "training", LABELS), 3, "raise")
    first, again, other = (images[SampleIndex(0, position)] for position in (7, 7, 8))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (3, 24, 24) and first[0].dtype == torch.float32
    assert first[1].shape == (24, 24) and first[1].dtype == torch.uint8


def test_image_and_label_stay_together():
    """An image whose red channel is its label: crops, flips and padding move both alike."""
    label = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3), 16, 0), 16, 1)
    image = np.stack([label * 40, label, label], axis=-1)
    exact = TrainTransform(32, 64, (1.0, 1.0), 40, 0.75, True, False, (0, 0, 0), (1, 1, 1))
    seen = set()
    for seed in range(8):
        pixels, target = exact(image, label, np.random.default_rng(seed))
        inside = target != IGNORE
        assert torch.equal(pixels[0][inside], target[inside] * 40.0)
        assert not pixels[:, ~inside].any()
        assert inside.sum() == 32 * 40  # 8 rows of padding
        seen.add(int(target[0, 0]))
    assert len(seen) > 1


def test_no_class_fills_a_crop():
    label = np.zeros((64, 200), np.uint8)
    label[:, 180:] = 1
    label[:32] = IGNORE
    shares = []
    for seed in range(50):
        top, left = random_crop_origin(label, 32, 0.75, np.random.default_rng(seed))
        crop = label[top : top + 32, left : left + 32]
        counts = np.bincount(crop[crop != IGNORE], minlength=2)
        shares.append(counts.max() < 0.75 * counts.sum())
    unrestricted = 10 / 169  # of the positions
    assert np.mean(shares) > 4 * unrestricted
    assert random_crop_origin(label[:20, :20], 32, 0.75, np.random.default_rng(0)) == (0, 0)


def test_colours_change_within_their_limits():
    image = np.full((8, 8, 3), (100, 120, 140), np.uint8)
    results = [photometric_distortion(image, np.random.default_rng(s)) for s in range(200)]
    assert all(r.dtype == np.uint8 and r.shape == image.shape for r in results)
    assert sum(np.array_equal(r, image) for r in results) == pytest.approx(200 / 16, abs=10)
    means = np.array([r.mean() for r in results])
    assert means.min() >= (120 - 32) * 0.5 - 30 and means.max() <= (120 + 32) * 1.5 + 30
    assert len({r.tobytes() for r in results}) > 150


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_of_any_number_of_channels(channels):
    """Each channel keeps its values and place; brightness and contrast change all alike."""
    rng = np.random.default_rng(0)
    image = np.repeat(rng.integers(0, 200, (20, 30, 1), np.uint8), channels, axis=2)
    image += np.arange(channels, dtype=np.uint8)
    statistics = tuple(float(i) for i in range(channels)), (1.0,) * channels
    label = np.zeros((20, 30), np.uint8)
    exact = TrainTransform(20, 40, (1.0, 1.0), 24, 0.75, False, False, *statistics)
    pixels, target = exact(image, label, rng)
    assert pixels.shape == (channels, 24, 24) and target.shape == (24, 24)
    assert all(torch.equal(pixels[0], channel) for channel in pixels)
    changed = {photometric_distortion(image, np.random.default_rng(s)).tobytes() for s in range(9)}
    assert len(changed) > 3
    (view,) = TestTransform(40, 80, (1.0,), *statistics)(image)
    assert view.shape == (channels, 40, 60)


# Preparation


def prepare(root, arguments):
    spec = importlib.util.spec_from_file_location("prepare", root / "datasets/prepare_ade20k.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


def test_an_archive_is_unpacked_and_checked(root, tree, tmp_path, capsys):
    archive = tmp_path / "ADEChallengeData2016.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for path in tree.rglob("*.*"):
            content.write(path, Path("ADEChallengeData2016", path.relative_to(tree)))
    target = tmp_path / "datasets/ade"
    arguments = ["--zip", archive, "--root", target, "--num-classes", 3]
    for _ in range(2):  # the second time there is nothing to unpack
        prepare(root, arguments)
        assert "training: 2 images with" in capsys.readouterr().out
    assert [path.name for path in target.parent.iterdir()] == ["ade"]
    with pytest.raises(ValueError, match=r"(?s)label 3 is impossible"):
        prepare(root, [*arguments[:-1], 2])


def test_a_missing_folder_is_named_by_its_argument(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^--root: no such folder: {tmp_path}/absent/im"):
        prepare(root, ["--root", tmp_path / "absent"])


def test_classes_are_counted_and_what_cannot_be_meant_is_refused(root, tmp_path, capsys):
    label = np.zeros((40, 50), np.uint8)
    label[:10] = 255
    for split in ("training", "validation"):
        write_pair(tmp_path, f"{split}/deep", "a", label=label)
    common = ["--root", tmp_path, "--num-classes", 2]
    with pytest.raises(ValueError, match='(?s)only .class 0. occurs; 500 pixels .*"0: 0, 255: 1"'):
        prepare(root, [*common, "--label-offset", 0, "--ignore", 255])
    prepare(root, [*common, "--label-map", "0: 0, 255: 1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[-2:] == [["class", "1", "25.00%", "500", "1"], ["(ignored)", "0.00%", "0"]]


def test_a_turned_image_is_named_as_the_cause(tmp_path):
    write_pair(tmp_path, "training", "a", label=np.ones((40, 50), np.uint8))
    path = tmp_path / "images/training/a.jpg"
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    with pytest.raises(ValueError, match="is 40x50, its image is 50x40; .*EXIF orientation 6"):
        load_split(tmp_path, "training", LABELS)


def test_a_bad_archive_leaves_nothing(tree, tmp_path):
    archive = tmp_path / "cut.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.write(tree / "images/training/a.jpg", "readme.jpg")
    with pytest.raises(ValueError, match="must hold one folder with images and annotations, got 0"):
        unpack(archive, tmp_path / "out/ade")
    truncate(archive)
    with pytest.raises(ValueError, match="cut.zip is damaged or cut off"):
        unpack(archive, tmp_path / "out/ade")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "absent.zip", tmp_path / "out/ade")


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path):
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("ade/images/training/a.jpg", b"")
        content.filelist[0].file_size = 1 << 50  # what its directory will claim
    with pytest.raises(OSError, match=r"bomb.zip unpacks to \d+ bytes, but .* has only \d+ bytes"):
        unpack(archive, tmp_path / "out/ade")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_could_not_be_read_is_tried_again(tree, monkeypatch):
    """A limit or a permission may change without a change of the file."""
    for path in tree.rglob("*.*"):
        os.utime(path, (1e9, 1e9))

    def refuse(path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        with pytest.raises(ValueError, match="(?s)inaccessible file: 2.*Too many open files"):
            load_split(tree, "training", LABELS)
    assert len(load_split(tree, "training", LABELS)) == 2


@pytest.mark.parametrize("file", ["images/training/bb.jpg", "annotations/training/bb.png"])
def test_a_broken_link_is_a_fault(file, tree):
    (tree / file).unlink()
    (tree / file).symlink_to(tree / "absent.jpg")
    with pytest.raises(ValueError, match=f"(?s)problems found: 1.*unreadable.*{file}"):
        load_split(tree, "training", LABELS)
    pairs = load_split(tree, "training", LABELS, on_error="skip", check_decode=True)
    assert [pair.image.stem for pair in pairs] == ["a"]


def test_unchanged_files_are_not_checked_again(tree, monkeypatch):
    """Faults are remembered as well as their absence; a changed file is read again."""
    write_pair(tree, "training", "bb", label=np.full((40, 50), 9, np.uint8))
    for path in tree.rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    first = load_split(tree, "training", LABELS, on_error="skip")
    assert [pair.image.stem for pair in first] == ["a"]
    read, calls = label_maps.read_label, []
    monkeypatch.setattr(
        label_maps, "read_label", lambda path, labels: calls.append(path) or read(path)
    )
    assert load_split(tree, "training", LABELS, on_error="skip") == first and not calls
    with pytest.raises(ValueError, match="label 9 is impossible"):
        load_split(tree, "training", LABELS)
    assert not calls
    write_pair(tree, "training", "bb")
    assert len(load_split(tree, "training", LABELS)) == 2 and len(calls) == 2
