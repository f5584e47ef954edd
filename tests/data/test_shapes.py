"""The sample data are valid, agree with themselves, and are the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os

import cv2
import numpy as np
import pytest

from spatial_mamba_d2.data import shapes
from spatial_mamba_d2.data.coco import load_coco
from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.data.sample_coco import mask_to_polygons, mask_to_rle
from spatial_mamba_d2.data.shapes import CLASSES, generate_shapes, render_image

NUM_TRAIN, NUM_VAL = 40, 4


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", num_train=NUM_TRAIN, num_val=NUM_VAL
    )


@pytest.fixture(scope="module")
def coco(tree):
    return pytest.importorskip("pycocotools.coco").COCO(tree / "instances_train.json")


def file_hashes(tree):
    files = (path for path in sorted(tree.rglob("*")) if path.is_file())
    return {
        path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# --- drawing ---------------------------------------------------------------------------------


def test_pixels_and_annotations_are_these_on_every_machine():
    # If a change is intended, increase GENERATOR_VERSION with it.
    digest = hashlib.sha256()
    for index in range(20):
        sample = render_image("train", index)
        digest.update(sample.image.tobytes())
        digest.update(sample.semantic.tobytes())
        for instance in sample.instances:
            digest.update(np.packbits(instance.mask).tobytes())
            digest.update(json.dumps(mask_to_polygons(instance.mask)).encode())
    assert digest.hexdigest() == "4dbc54657517e116d5400fed20ebce4c90cf68133ab530e2703e2a43c80920a7"
    assert shapes.GENERATOR_VERSION == 1


@pytest.mark.parametrize(
    "other", [("train", 1, 0), ("val", 0, 0), ("train", 0, 1)], ids=["index", "split", "seed"]
)
def test_split_index_and_seed_each_change_the_image(other):
    split, index, seed = other
    first, second = render_image("train", 0), render_image(split, index, seed=seed)
    assert first.image.tobytes() != second.image.tobytes()


def test_sample_has_the_promised_shapes_and_types():
    sample = render_image("val", 3, image_px=(40, 64))
    height, width, channels = sample.image.shape
    assert 40 <= height <= 64 and 40 <= width <= 64 and channels == 3
    assert sample.image.dtype == sample.semantic.dtype == np.uint8
    assert sample.semantic.shape == (height, width)
    for instance in sample.instances:
        assert instance.mask.dtype == bool and instance.mask.shape == (height, width)


@pytest.mark.parametrize(
    "corners, rows, columns",
    [
        ((-2, -2, 3.5, 4), (0, 4), (0, 4)),
        ((6, 5.5, 14, 20), (5, 8), (6, 10)),
        ((2, -5, 4, -1), (0, 0), (2, 4)),
        ((11, 2, 12, 3), (2, 3), (10, 10)),
    ],
)
def test_coverage_of_outlines_beyond_the_image(corners, rows, columns):
    x0, y0, x1, y1 = corners
    box, coverage = shapes._coverage([np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])], 8, 10)
    assert box == (slice(*rows), slice(*columns))
    y, x = np.arange(8)[box[0]], np.arange(10)[box[1]]
    expected = np.outer(
        (np.minimum(y + 1, y1) - np.maximum(y, y0)).clip(0),
        (np.minimum(x + 1, x1) - np.maximum(x, x0)).clip(0),
    )
    np.testing.assert_array_equal(coverage, expected)


def test_semantic_labels_agree_with_the_instances():
    for index in range(60):
        sample = render_image("train", index)
        covered = np.zeros(sample.semantic.shape, int)
        for instance in sample.instances:
            covered += instance.mask
            label = 2 + CLASSES.index(instance.shape)
            assert (sample.semantic[instance.mask] == label).all()
        assert covered.max() <= 1, "visible parts do not overlap"
        assert ((covered == 1) == (sample.semantic >= 2)).all()


def test_every_difficulty_occurs():
    samples = [render_image("train", index) for index in range(200)]
    instances = [instance for sample in samples for instance in sample.instances]
    assert {instance.shape.name for instance in instances} == {c.name for c in CLASSES}
    assert any(not sample.instances for sample in samples)
    assert any((sample.semantic == shapes.IGNORED).any() for sample in samples)
    assert 5 < sum(instance.iscrowd for instance in instances) < 40
    sizes_px = [np.count_nonzero(i.mask) for i in instances if not i.iscrowd]
    assert min(sizes_px) < 40 and max(sizes_px) > 3000
    assert any(len(mask_to_polygons(i.mask)) > 1 for i in instances if not i.iscrowd)
    heights_widths = {sample.image.shape[:2] for sample in samples}
    assert {h > w for h, w in heights_widths} == {True, False}


def test_what_a_mask_shows_has_the_hue_of_its_class():
    for index in range(60):
        sample = render_image("train", index)
        hues = cv2.cvtColor(sample.image, cv2.COLOR_RGB2HSV)[..., 0].astype(float)
        for instance in sample.instances:
            offsets = (hues[instance.mask] - 180 * instance.shape.hue + 90) % 180 - 90
            if len(offsets) > 100:  # fewer are mostly border
                assert abs(np.median(offsets)) < 12, (index, instance.shape.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split must be one of \['train', 'val'\], got 'test'"),
        ({"index": -1}, "index must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"image_px": (64, 32)}, r"image_px must be .* got \(64, 32\)"),
        ({"image_px": (8, 32)}, r"image_px must be .* got \(8, 32\)"),
    ],
)
def test_render_image_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_image(**{"split": "train", "index": 0, **arguments})


# --- masks in COCO's forms -------------------------------------------------------------------


def random_masks():
    rng = np.random.default_rng(0)
    for density in (0.05, 0.3, 0.5, 0.7, 0.95):  # specks, pinches, holes in holes
        yield rng.random((17, 23)) < density
    for index in range(10):
        yield from (instance.mask for instance in render_image("train", index).instances)
    ring = np.ones((9, 9), bool)
    ring[2:7, 2:7] = False
    ring[4, 4] = True
    yield ring


def test_polygons_and_rle_decode_to_the_very_mask():
    codec = pytest.importorskip("pycocotools.mask")
    for mask in random_masks():
        polygons = mask_to_polygons(mask)
        decoded = codec.decode(codec.merge(codec.frPyObjects(polygons, *mask.shape)))
        assert (decoded == mask).all()
        decoded = codec.decode(codec.frPyObjects(mask_to_rle(mask), *mask.shape))
        assert (decoded == mask).all()


def test_a_square_needs_four_corners():
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:7] = True
    (polygon,) = mask_to_polygons(mask)
    corners = set(zip(polygon[0::2], polygon[1::2], strict=True))
    assert corners == {(2, 1), (7, 1), (7, 4), (2, 4)} and len(polygon) == 8
    assert mask_to_polygons(np.zeros((6, 8), bool)) == []


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        ([[0, 1], [0, 1]], [2, 2]),
        ([[1, 0], [1, 0]], [0, 2, 2]),
        ([[1, 1], [1, 1]], [0, 4]),
        ([[0, 0], [0, 0]], [4]),
    ],
)
def test_rle_counts_start_with_zeros_and_run_down_the_columns(mask, counts):
    assert mask_to_rle(np.array(mask, bool)) == {"size": [2, 2], "counts": counts}


# --- the tree on disk ------------------------------------------------------------------------


def test_annotations_agree_with_pycocotools_and_the_label_files(tree, coco):
    labels = {shape.category_id: 2 + index for index, shape in enumerate(CLASSES)}
    assert sorted(labels) == coco.getCatIds() != list(range(1, 1 + len(labels)))
    for image in coco.loadImgs(coco.getImgIds()):
        stem = image["file_name"].removesuffix(".jpg")
        file = tree / f"annotations/training/{stem}.png"
        semantic = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_UNCHANGED)
        assert semantic.dtype == np.uint8
        assert semantic.shape == (image["height"], image["width"])
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = coco.annToMask(annotation).astype(bool)
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            box = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert annotation["bbox"] == box
            assert annotation["area"] == mask.sum()
            assert (semantic[mask] == labels[annotation["category_id"]]).all()
            is_rle = isinstance(annotation["segmentation"], dict)
            assert is_rle == bool(annotation["iscrowd"])


def test_files_hold_the_rendered_images(tree):
    for split, folder in (("train", "training"), ("val", "validation")):
        sample = render_image(split, 2)
        image = read_image(tree / f"images/{folder}/000000000003.jpg")
        error = np.abs(image.astype(int) - sample.image)
        assert error.mean() < 4, "JPEG loses little, and the channels are in order"


def test_both_splits_load_without_a_problem(tree):
    splits = (("train", "training", NUM_TRAIN), ("val", "validation", NUM_VAL))
    for split, folder, num_images in splits:
        dataset = load_coco(
            tree / f"instances_{split}.json", tree / "images" / folder, check_decode=True
        )
        assert len(dataset.records) == num_images and not dataset.faults
        assert dataset.categories == [(shape.category_id, shape.name) for shape in CLASSES]


def test_object_info_lists_the_labels_as_ade20k_does(tree):
    header, *lines = (tree / "objectInfo.txt").read_text().splitlines()
    assert header.split("\t") == ["Idx", "Ratio", "Train", "Val", "Name"]
    rows = [line.split("\t") for line in lines]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row[4] for row in rows] == ["background", *(shape.name for shape in CLASSES)]
    assert rows[0][2:4] == [str(NUM_TRAIN), str(NUM_VAL)]
    assert 0.97 < sum(float(row[1]) for row in rows) <= 1.0003  # the rest is ignored


def test_a_longer_split_begins_with_the_shorter(tree, tmp_path):
    longer = file_hashes(tree)
    shorter = file_hashes(generate_shapes(tmp_path / "shapes", num_train=2, num_val=1))
    images = {name: digest for name, digest in shorter.items() if name.endswith((".jpg", ".png"))}
    assert len(images) == 6
    assert images.items() <= longer.items()


def test_same_arguments_write_the_same_bytes(tmp_path):
    first = generate_shapes(tmp_path / "a", num_train=3, num_val=1, seed=7)
    second = generate_shapes(tmp_path / "b", num_train=3, num_val=1, seed=7)
    assert file_hashes(first) == file_hashes(second)


# --- reuse, refusal, interruption ------------------------------------------------------------


def test_a_complete_tree_is_reused(tmp_path, monkeypatch):
    root = generate_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    monkeypatch.setattr(shapes, "render_image", lambda *args, **kwargs: pytest.fail("drawn again"))
    assert generate_shapes(root, num_train=2, num_val=1) == root


def test_an_empty_folder_is_filled(tmp_path):
    assert generate_shapes(tmp_path, num_train=1, num_val=1) == tmp_path
    assert (tmp_path / "instances_val.json").is_file()


@pytest.mark.parametrize(
    "change",
    [{"num_train": 3}, {"num_val": 2}, {"image_px": (128, 193)}, {"seed": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_tree_with_other_parameters_is_refused(tmp_path, change):
    root = generate_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    before = file_hashes(root)
    with pytest.raises(ValueError, match=r"root must be absent, empty.*shapes holds \{'version'"):
        generate_shapes(root, **{"num_train": 2, "num_val": 1, **change})
    assert file_hashes(root) == before


def test_a_tree_of_another_version_is_refused(tmp_path, monkeypatch):
    root = generate_shapes(tmp_path / "shapes", num_train=1, num_val=1)
    monkeypatch.setattr(shapes, "GENERATOR_VERSION", 2)
    with pytest.raises(ValueError, match="root must be absent"):
        generate_shapes(root, num_train=1, num_val=1)


@pytest.mark.parametrize("name", ["notes.txt", "instances_train.json"])
def test_anything_else_is_refused(tmp_path, name):
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match="holds something else"):
        generate_shapes(tmp_path, num_train=1, num_val=1)
    with pytest.raises(ValueError, match="holds something else"):
        generate_shapes(tmp_path / name, num_train=1, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_call_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch, error):
    def render_two(split, index, **kwargs):
        if index == 2:
            raise error
        return render_image(split, index, **kwargs)

    root = tmp_path / "shapes"
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "render_image", render_two)
        with pytest.raises((KeyboardInterrupt, OSError)):
            generate_shapes(root, num_train=4, num_val=1)
    assert list(tmp_path.iterdir()) == []
    assert (generate_shapes(root, num_train=4, num_val=1) / "instances_val.json").is_file()


def test_the_tree_appears_only_when_complete(tmp_path, monkeypatch):
    # A killed process leaves behind what is there before the last step.
    root = tmp_path / "shapes"
    rename = os.replace

    def check_first(source, target):
        assert not root.exists()
        assert len(file_hashes(source)) == 3 * 2 + 3
        rename(source, target)

    monkeypatch.setattr(os, "replace", check_first)
    generate_shapes(root, num_train=2, num_val=1)
    assert root.is_dir()


def test_the_faster_of_two_processes_wins(tmp_path, monkeypatch):
    root = tmp_path / "shapes"

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(shapes, "render_image", render_image)
        generate_shapes(root, num_train=1, num_val=1)
        return render_image(*args, **kwargs)

    monkeypatch.setattr(shapes, "render_image", overtaken)
    assert generate_shapes(root, num_train=1, num_val=1) == root
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


@pytest.mark.parametrize("name", ["num_train", "num_val"])
def test_generate_shapes_refuses_an_empty_split(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        generate_shapes(tmp_path / "shapes", **{name: 0})
