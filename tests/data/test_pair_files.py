"""Which image belongs to which label: suffixes, subfolders, lists of names, and what is no data."""

from __future__ import annotations

import logging

import pytest

from spatial_mamba_d2.data.pair_files import Layout, find_pairs


@pytest.fixture
def touch(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def names_of(root, pairs):
    files = [
        (p.image.relative_to(root).as_posix(), p.label.relative_to(root).as_posix()) for p in pairs
    ]
    return dict(zip([p.name for p in pairs], files, strict=True))


def test_subfolders_next_to_flat_files(touch, tmp_path):
    root = touch(
        "images/train/a.jpg", "images/train/x/a.JPG", "images/train/x/y/b.PNG",
        "annotations/train/a.png", "annotations/train/x/a.png", "annotations/train/x/y/b.PNG",
    )  # fmt: skip
    other = touch("elsewhere/c.jpg") / "elsewhere"
    (root / "images/train/linked").symlink_to(other)
    (root / "images/train/x/circle").symlink_to(root / "images/train")
    touch("annotations/train/linked/c.png")
    pairs, faults = find_pairs(root, "train")
    assert not faults
    assert names_of(root, pairs) == {
        "a": ("images/train/a.jpg", "annotations/train/a.png"),
        "linked/c": ("images/train/linked/c.jpg", "annotations/train/linked/c.png"),
        "x/a": ("images/train/x/a.JPG", "annotations/train/x/a.png"),
        "x/y/b": ("images/train/x/y/b.PNG", "annotations/train/x/y/b.PNG"),
    }


def test_cityscapes_as_it_is(touch, caplog):
    caplog.set_level(logging.INFO, "spatial_mamba_d2")
    root = touch(
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
        *(
            f"gtFine/train/aachen/aachen_000000_000019_gtFine_{kind}"
            for kind in ("color.png", "labelIds.png", "instanceIds.png", "polygons.json")
        ),
    )
    layout = Layout(
        "leftImg8bit/{split}", "gtFine/{split}", "_leftImg8bit.png", "_gtFine_labelIds.png"
    )
    pairs, faults = find_pairs(root, "train", layout)
    assert not faults and [p.name for p in pairs] == ["aachen/aachen_000000_000019"]
    assert pairs[0].label.name == "aachen_000000_000019_gtFine_labelIds.png"
    assert "not used, because of their names: 3 files" in caplog.text


def test_voc_as_it_is(touch):
    root = touch("JPEGImages/2007_1.jpg", "JPEGImages/2007_2.jpg", "JPEGImages/2007_3.jpg",
                 "SegmentationClass/2007_1.png", "SegmentationClass/2007_3.png",
                 "ImageSets/Segmentation/train.txt")  # fmt: skip
    split, layout = "ImageSets/Segmentation/train.txt", Layout("JPEGImages", "SegmentationClass")
    names = root / split
    names.write_text("\ufeff2007_3\r\n\r\n2007_1.jpg\r\n", encoding="utf-8")
    pairs, faults = find_pairs(root, split, layout)
    assert not faults and [p.name for p in pairs] == ["2007_3", "2007_1"]
    names.write_text("2007_1\n2007_1\n2007_2\n2007_9\n")
    pairs, faults = find_pairs(root, split, layout)
    assert [p.name for p in pairs] == ["2007_1"]
    assert [fault.kind for fault in faults] == [
        "name listed twice", "listed name without label", "listed name without image",
    ]  # fmt: skip
    assert all(str(names) in fault.reason for fault in faults)
    names.write_bytes("Straße\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt must be in UTF-8"):
        find_pairs(root, split, layout)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*val\.txt"):
        find_pairs(root, "val.txt", layout)


def test_any_file_may_be_a_list(touch):
    root = touch("images/a.jpg", "annotations/a.png", "train.lst")
    (root / "train.lst").write_text("a\n")
    assert [p.name for p in find_pairs(root, "train.lst")[0]] == ["a"]


def test_a_list_of_two_files_a_line(touch):
    root = touch("a/x 1.jpg", "a/x.jpg", "b/y.png", "images/.keep", "annotations/.keep", "t.txt")
    (root / "t.txt").write_text("/a/x.jpg b/y.png\na/x.jpg b/none.png\n")
    pairs, faults = find_pairs(root, "t.txt")
    assert names_of(root, pairs) == {"a/x": ("a/x.jpg", "b/y.png")}
    assert [fault.kind for fault in faults] == ["listed name without image"]


@pytest.mark.parametrize("suffix", ["_mask.png", "_mask", "*_mask.png", "_MASK.PNG"])
def test_suffixes_of_labels(suffix, touch):
    root = touch("images/t/a.jpg", "images/t/b.jpg", "annotations/t/a_mask.png",
                 "annotations/t/b_mask.PNG")  # fmt: skip
    pairs, faults = find_pairs(root, "t", Layout(label_suffix=suffix))
    assert not faults and [p.name for p in pairs] == ["a", "b"]
    pairs, faults = find_pairs(root, "t")
    assert not pairs
    assert "DATASETS.LABEL_SUFFIX _mask.png" in faults[-1].reason


def test_images_and_labels_in_one_folder(touch):
    root = touch("t/a.jpg", "t/a_mask.png", "t/b.png", "t/b_mask.png")
    pairs, faults = find_pairs(root, "t", Layout("{split}", "{split}", "", "_mask.png"))
    assert not faults
    assert names_of(root, pairs) == {
        "a": ("t/a.jpg", "t/a_mask.png"), "b": ("t/b.png", "t/b_mask.png")
    }  # fmt: skip


def test_files_of_one_name_are_a_fault(touch):
    root = touch("images/t/a.jpg", "images/t/a.png", "images/t/b.jpg", "images/t/c.jpg",
                 "annotations/t/a.png", "annotations/t/b.png", "annotations/t/b.tif",
                 "annotations/t/c.png")  # fmt: skip
    pairs, faults = find_pairs(root, "t")
    assert [p.name for p in pairs] == ["c"]
    assert [fault.kind for fault in faults] == ["several files of one name"] * 2
    reasons = " ".join(fault.reason for fault in faults)
    assert all(name in reasons for name in ("a.jpg", "a.png", "b.png", "b.tif"))


def test_litter_is_no_data(touch):
    root = touch(
        "images/t/a.jpg", "annotations/t/a.png", "images/t/._a.jpg", "images/t/.DS_Store",
        "images/t/Thumbs.db", "images/t/@eaDir/a.jpg", "annotations/t/.ipynb_checkpoints/a.png",
        "images/t/__MACOSX/x.jpg", "images/t/notes.txt",
    )  # fmt: skip
    pairs, faults = find_pairs(root, "t")
    assert [p.name for p in pairs] == ["a"] and not faults


def test_files_without_partner_are_named(touch):
    root = touch("images/t/a.jpg", "images/t/x/b.jpg", "annotations/t/a.png",
                 "annotations/t/c.png")  # fmt: skip
    _, faults = find_pairs(root, "t")
    assert {fault.kind: fault.reason for fault in faults} == {
        "image without label": f"{root}/images/t/x/b.jpg: no {root}/annotations/t/x/b.png",
        "label without image": f"{root}/annotations/t/c.png: no image c in {root}/images/t",
    }


def test_a_missing_folder_is_named(touch):
    root = touch("images/t/a.jpg")
    with pytest.raises(FileNotFoundError, match="DATASETS.ROOT: no such folder: .*annotations/t "):
        find_pairs(root, "t")
