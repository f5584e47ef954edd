"""Files with names of classes, in the encodings and with the mistakes that people's files have."""

from __future__ import annotations

import codecs

import pytest

from spatial_mamba_d2.data import ade20k, imagenet
from spatial_mamba_d2.data.class_file import compare_class_names

NAMES = ("background", "Straße", "道路")
TEXT = "\n".join(NAMES)


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        ("\r\n" + TEXT.replace("\n", "  \r\n") + "\r\n\r\n").encode(),
    ],
    ids=["UTF-8", "byte order mark", "UTF-16", "big-endian UTF-16", "Windows' lines"],
)
def test_encodings(content, tmp_path):
    (tmp_path / "names.txt").write_bytes(content)
    assert ade20k.load_classes("names.txt", tmp_path, 3).names == NAMES
    assert imagenet.load_classes("names.txt", tmp_path, "train", 3) == NAMES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Straße\nb\n".encode("latin-1"), r"names\.txt must be in UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", r"names\.txt must be in UTF-16, as its byte order mark says"),
        (b"road\nsky\nroad\n", r"names\.txt\): names .* must differ, got more than once: 'road'"),
    ],
)
def test_bad_files_are_named(content, message, tmp_path):
    (tmp_path / "names.txt").write_bytes(content)
    num_classes = len(content.split())
    with pytest.raises(ValueError, match=f"DATASETS.CLASSES.*{message}"):
        ade20k.load_classes("names.txt", tmp_path, num_classes)
    with pytest.raises(ValueError, match=f"DATASETS.CLASSES.*{message}"):
        imagenet.load_classes("names.txt", tmp_path, "train", num_classes)


def test_commas(tmp_path):
    """They are part of a name, except in ADE20K's table, where they separate synonyms."""
    (tmp_path / "plain.txt").write_text("vehicle, small\nvehicle, large\n")
    assert ade20k.load_classes("plain.txt", tmp_path, 2).names == (
        "vehicle, small",
        "vehicle, large",
    )
    table = "Idx\tRatio\tName\n1\t0.1\twall\n2\t0.1\t{}\n"
    (tmp_path / "table.txt").write_text(table.format("building, edifice"))
    assert ade20k.load_classes("table.txt", tmp_path, 2).names == ("wall", "building")
    (tmp_path / "table.txt").write_text(table.format("wall, small"))
    assert ade20k.load_classes("table.txt", tmp_path, 2).names == ("wall", "wall, small")


def test_names_of_known_data_sets():
    assert ade20k.load_classes("cityscapes", ".", 19).names[:2] == ("road", "sidewalk")
    assert ade20k.load_classes("voc", ".", 21).palette[1] == (128, 0, 0)
    with pytest.raises(ValueError, match="NUM_CLASSES must be 19, .*'cityscapes', got 20"):
        ade20k.load_classes("cityscapes", ".", 20)


def test_classes_of_a_checkpoint_and_of_the_data():
    data = ("sky", "road", "tree")
    assert compare_class_names(data, data, "a.ckpt") == ""
    assert compare_class_names((), data, "a.ckpt") == ""
    assert compare_class_names(("class 0", "class 1", "class 2"), data, "a.ckpt") == ""
    assert compare_class_names(("sky", "street", "tree"), data, "a.ckpt") == (
        "names of 1 classes differ: class 1 is 'street' in a.ckpt, and 'road' in DATASETS.CLASSES"
    )
    with pytest.raises(ValueError, match=r"class 0 is 'road' in a\.ckpt, and 'sky'"):
        compare_class_names(("road", "sky", "tree"), data, "a.ckpt")
    words = {"where": "the data", "order_counts": False}
    assert compare_class_names(("road", "sky", "tree"), data, "a.ckpt", **words) == (
        "names of classes are the same in another order: class 0 is 'road' in a.ckpt, and 'sky' in "
        "the data"
    )
    assert compare_class_names(None, data, "a.ckpt") == compare_class_names(80, data, "a") == ""
