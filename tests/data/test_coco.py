"""`load_coco` finds every fault, and names the file and the reason."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data import coco, coco_images, coco_masks, faults
from spatial_mamba_d2.data.coco import load_coco
from spatial_mamba_d2.data.images import read_image

HEIGHT, WIDTH = 6, 8


def valid_content():
    box = {"category_id": 3, "bbox": [1, 1, 4, 3], "area": 12, "iscrowd": 0}
    rle = {"size": [HEIGHT, WIDTH], "counts": [7, 5, 36]}
    return {
        "info": {},
        "images": [
            {"id": 10, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 20, "file_name": "sub/b.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": 1, "image_id": 10, "segmentation": [[1, 1, 5, 1, 5, 4, 1, 4]], **box},
            {"id": 2, "image_id": 10, "segmentation": rle, **box, "iscrowd": 1},
            {"id": 3, "image_id": 20, **box, "category_id": 1},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}],
    }


class Folder:
    """A small data set on disk, to be damaged by the tests."""

    def __init__(self, root: Path):
        self.images = root / "images"
        self.json_file = root / "instances.json"
        self.content = valid_content()
        self.image, self.annotation = self.content["images"][0], self.content["annotations"][0]
        (self.images / "sub").mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(self.images / "a.jpg")
        Image.fromarray(noise).save(self.images / "sub" / "b.png")

    def load(self, **kwargs):
        self.json_file.write_text(json.dumps(self.content))
        return load_coco(self.json_file, self.images, **kwargs)

    def expect(self, caplog, *parts: str, images: int = 2, annotations: int = 2, **kwargs):
        """Check both modes: the message holds `parts`; a skip leaves so much, with one warning."""
        with pytest.raises(ValueError) as caught:
            self.load(**kwargs)
        first, kind, problem = str(caught.value).splitlines()
        assert first.startswith(f"{self.json_file}: problems found: 1.")
        assert first.endswith("DATASETS.ON_ERROR skip")
        for part in parts:
            assert part in problem
        dataset = self.load(on_error="skip", **kwargs)
        (fault,) = dataset.faults
        assert (fault.reason, f"{fault.kind}: 1") == (problem.strip(), kind.strip())
        assert len(dataset.records) == images
        assert sum(len(record["annotations"]) for record in dataset.records) == annotations
        (record,) = (record for record in caplog.records if record.name == faults.__name__)
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            f"{self.json_file}: skipped because of {fault.kind}: 1, the first: {fault.reason}"
        )


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


# --- valid data ------------------------------------------------------------------------------


def test_valid_data_come_through_unchanged(folder, caplog):
    original = copy.deepcopy(folder.content)
    dataset = folder.load(check_decode=True)
    assert dataset.categories == [(1, "dog"), (3, "cat")]
    assert dataset.faults == [] and not dataset.is_changed
    assert dataset.notes == [
        "1 of 3 annotations are crowds (iscrowd 1): they neither train nor "
        "count; if they are single objects, as brush masks of some tools, "
        "set iscrowd to 0"
    ]
    first, second = dataset.records
    assert first == {
        "file_name": str(folder.images.absolute() / "a.jpg"),
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 10,
        "annotations": original["annotations"][:2],
    }
    assert Path(second["file_name"]) == folder.images.absolute() / "sub" / "b.png"
    assert second["annotations"] == original["annotations"][2:]


def test_relative_folders_give_absolute_file_names(folder, monkeypatch):
    folder.load()
    monkeypatch.chdir(folder.images.parent)
    dataset = load_coco("instances.json", "images")
    assert all(Path(record["file_name"]).is_file() for record in dataset.records)
    assert all(Path(record["file_name"]).is_absolute() for record in dataset.records)


@pytest.mark.parametrize(
    ("split", "images", "annotations"), [("train", 130, 1217), ("val", 80, 815)]
)
def test_real_coco_is_valid(coco_mini, split, images, annotations):
    dataset = load_coco(
        coco_mini / f"instances_{split}.json", coco_mini / "images", check_decode=True
    )
    assert len(dataset.records) == images and len(dataset.categories) == 80
    assert sum(len(record["annotations"]) for record in dataset.records) == annotations


def test_folders_are_listed_once_instead_of_asking_for_each_file(folder, monkeypatch):
    calls = []
    real_listdir = coco_images.os.listdir
    monkeypatch.setattr(coco_images.os, "listdir", lambda f: calls.append(f) or real_listdir(f))
    folder.content["images"] *= 50
    folder.content["images"] = [
        {**image, "id": number} for number, image in enumerate(folder.content["images"])
    ]
    folder.content["annotations"] = []
    assert len(folder.load().records) == 100
    assert len(calls) == 2


# --- the whole file is wrong: an error in both modes -----------------------------------------

both_modes = pytest.mark.parametrize("on_error", ["raise", "skip"])


@both_modes
def test_missing_json(folder, on_error):
    with pytest.raises(FileNotFoundError, match="json_file: no file .*nowhere.json"):
        load_coco(folder.images / "nowhere.json", folder.images, on_error=on_error)


@both_modes
def test_missing_image_folder(folder, on_error):
    folder.load()
    with pytest.raises(FileNotFoundError, match="image_root: no such folder: /.*nowhere"):
        load_coco(folder.json_file, folder.images / "nowhere", on_error=on_error)


@both_modes
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"\xff\xd8", lambda b: b""]
)
def test_no_json_or_half_of_it(folder, on_error, damage):
    folder.load()
    folder.json_file.write_bytes(damage(folder.json_file.read_bytes()))
    with pytest.raises(ValueError, match=r"instances\.json: not JSON, or cut off: ."):
        load_coco(folder.json_file, folder.images, on_error=on_error)


@both_modes
@pytest.mark.parametrize("section", coco.SECTIONS)
@pytest.mark.parametrize("value", [None, {}], ids=["absent", "no list"])
def test_missing_section(folder, on_error, section, value):
    folder.content[section] = value
    with pytest.raises(ValueError, match=rf"instances\.json: not in COCO.*: {section} is missing"):
        folder.load(on_error=on_error)


@both_modes
def test_not_an_object(folder, on_error):
    folder.content = [1, 2]
    with pytest.raises(ValueError, match=r"instances\.json: not in COCO"):
        folder.load(on_error=on_error)


@both_modes
def test_empty_dataset(folder, on_error):
    folder.content["images"] = folder.content["annotations"] = []
    with pytest.raises(ValueError, match=r"instances\.json: nothing is usable$"):
        folder.load(on_error=on_error)


@both_modes
def test_nothing_usable_left(folder, on_error):
    for image in folder.content["images"]:
        image["file_name"] = "gone.jpg"
    with pytest.raises(
        ValueError, match=r"instances\.json: nothing is usable\n.*missing.*\n.*no file .*gone\.jpg"
    ):
        folder.load(on_error=on_error)


def test_unknown_mode(folder):
    with pytest.raises(ValueError, match='on_error must be "raise" or "skip", got "?\'ignore\''):
        folder.load(on_error="ignore")


# --- one entry is wrong ----------------------------------------------------------------------


def test_missing_image(folder, caplog):
    (folder.images / "a.jpg").unlink()
    folder.expect(
        caplog, "image 10 (a.jpg)", f"no file {folder.images / 'a.jpg'}", images=1, annotations=1
    )


def test_missing_subfolder(folder, caplog):
    folder.content["images"][1]["file_name"] = "other/b.png"
    folder.expect(caplog, "image 20 (other/b.png): no file", images=1)


def test_repeated_image_id(folder, caplog):
    folder.content["images"].append({**folder.image, "file_name": "sub/b.png"})
    folder.expect(caplog, "image 10 (sub/b.png): another image has this id", annotations=3)


@pytest.mark.parametrize("value", [None, 0, "tall", 4.5])
def test_malformed_image_size(folder, caplog, value):
    folder.content["images"].append({**folder.image, "id": 30, "height": value})
    folder.expect(
        caplog,
        f"image 30 (a.jpg): height must be an integer above 0, got {value!r}",
        annotations=3,
    )


@pytest.mark.parametrize(
    "entry", [7, {"id": 30}, {"file_name": "a.jpg"}, {"id": [], "file_name": ""}]
)
def test_malformed_image(folder, caplog, entry):
    folder.content["images"].append(entry)
    folder.expect(caplog, "needs an id and a file_name", annotations=3)


def test_repeated_category_id(folder, caplog):
    folder.content["categories"].append({"id": 3, "name": "cow"})
    folder.expect(caplog, "category 3: another category has this id", annotations=3)
    assert folder.load(on_error="skip").categories == [(1, "dog"), (3, "cat")]


@pytest.mark.parametrize("entry", [None, {"id": 5}, {"id": "five", "name": "cow"}])
def test_malformed_category(folder, caplog, entry):
    folder.content["categories"].append(entry)
    folder.expect(caplog, "category", "needs an integer id and a name", annotations=3)


def test_unknown_category(folder, caplog):
    folder.annotation["category_id"] = 2
    folder.expect(caplog, "annotation 1 of image 10: no category has the id 2")


@pytest.mark.parametrize("value", [99, None, [10]])
def test_unknown_image_id(folder, caplog, value):
    folder.annotation["image_id"] = value
    folder.expect(caplog, "annotation 1 of image", f"no usable image has the id {value}")


def test_an_exact_repetition_counts_once(folder, caplog):
    folder.content["annotations"].append(dict(folder.annotation))
    dataset = folder.load()
    assert [a["id"] for record in dataset.records for a in record["annotations"]] == [1, 2, 3]
    (record,) = (record for record in caplog.records if record.name == faults.__name__)
    assert record.getMessage().endswith(
        "skipped because of repeated annotation: 1, the first: annotation 1 of image 10: another "
        "one has the same id and content"
    )


def test_repetitions_among_many_annotations_with_one_id(folder):
    """Each is compared to what was seen, not to each other one: this would take minutes."""
    others = [
        {**folder.annotation, "id": 1, "note": number, "list": [0] * 50} for number in range(8000)
    ]
    folder.content["annotations"] += [*others, *others[:5]]
    dataset = folder.load()
    ids = [a["id"] for record in dataset.records for a in record["annotations"]]
    assert sorted(ids) == list(range(1, 8004))


@pytest.mark.parametrize("entry", ["x", 7, [1]])
def test_malformed_annotation(folder, caplog, entry):
    folder.content["annotations"].append(entry)
    folder.expect(caplog, "annotation", "must be an object", annotations=3)


def test_malformed_iscrowd(folder, caplog):
    folder.annotation["iscrowd"] = "no"
    folder.expect(caplog, "annotation 1 of image 10: iscrowd is 'no'")


@pytest.mark.parametrize(
    "value", ["x", [1, 2, 3], [1, 1, math.nan, 3], [1, math.inf, 4, 3], [1, 1, "w", 3], [None] * 4]
)
def test_malformed_box(folder, caplog, value):
    folder.annotation["bbox"] = value
    folder.expect(caplog, "annotation 1 of image 10: bbox must be 4 finite numbers, got")


def test_negative_box(folder, caplog):
    folder.annotation["bbox"] = [1, 1, -4, 3]
    folder.expect(caplog, "annotation 1 of image 10: bbox [1, 1, -4, 3] must have width and height")


@pytest.mark.parametrize("value", [[1, 1, 0, 3], [1, 1, 4, 0.0]])
@pytest.mark.parametrize("segmentation", [None, [[1, 1, 1, 4, 1, 2]]])
def test_box_without_area_is_left_out(folder, caplog, value, segmentation):
    folder.annotation.update(bbox=value, segmentation=segmentation)
    dataset = folder.load()
    assert dataset.faults == []
    assert sum(len(record["annotations"]) for record in dataset.records) == 2
    (record,) = (record for record in caplog.records if record.name == faults.__name__)
    assert "skipped because of box without area: 1, the first: " in record.getMessage()


@pytest.mark.parametrize(
    ("polygons", "reason"),
    [
        ("x", "segmentation must be polygons or RLE, got 'x'"),
        ([[1, 1, 5, 1]], "3 or more pairs of numbers, got 4 numbers"),
        ([[1, 1, 5, 1, 5, 4, 1]], "3 or more pairs of numbers, got 7 numbers"),
        ([[1, 1, 5, 1, 5, math.nan]], "must be finite numbers"),
        ([[1, 1, 5, 1, -math.inf, math.inf]], "must be finite numbers"),
        ([[1, 1, 5, 1, 5, "y"]], "must be finite numbers"),
        ([[1, 1, 5, 1, 5, None]], "must be finite numbers"),
        ([[[1, 1, 0], [5, 1, 0], [5, 4, 0]]], "a point must be [x, y], got"),
        ([[1.1, 1.1, 2.2, 2.2, 3.3, 3.3]], "enclose no area"),
        ([[2, 2, 2, 2, 2, 2], [1, 1, 1, 3, 1, 5]], "enclose no area"),
        ([[1, 1, 5, 1], [1, 1]], "3 or more pairs of numbers, got 4 numbers"),
    ],
)
def test_degenerate_polygon(folder, caplog, polygons, reason):
    folder.annotation["segmentation"] = polygons
    folder.expect(caplog, "annotation 1 of image 10: ", reason)


def test_a_sliver_beside_a_good_polygon_is_kept(folder):
    folder.annotation["segmentation"].append([2, 2, 2, 2, 2, 2])
    assert len(folder.load().records[0]["annotations"]) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": [WIDTH, HEIGHT]}, "its size is [8, 6], that of the image [6, 8]"),
        ({"size": None}, "its size is None"),
        ({"counts": [7, 5, 35]}, "counts sum to 47, the image has 48 pixels"),
        ({"counts": [7, 5, 37]}, "counts sum to 49, the image has 48 pixels"),
        ({"counts": [7, -5, 46]}, "counts must be integers from 0 on"),
        ({"counts": [7.5, 5, 35.5]}, "counts must be integers from 0 on"),
        ({"counts": [7.0, 5.0, math.inf]}, "integers from 0 on, got [7.0, 5.0, inf]"),
        ({"counts": [7.0, math.nan, 5.0, 36.0]}, "integers from 0 on, got [7.0, nan"),
        ({"counts": None}, "counts must be integers from 0 on, got None"),
        ({"counts": [48]}, "marks no pixel"),
        ({"counts": "75T"}, "counts must be integers from 0 on, got '75T'"),  # more should follow
        ({"counts": "75"}, "counts sum to 12, the image has 48 pixels"),
        ({"counts": "\x01"}, "counts must be integers from 0 on"),
    ],
)
def test_wrong_rle(folder, caplog, change, reason):
    folder.content["annotations"][1]["segmentation"].update(change)
    folder.expect(caplog, "annotation 2 of image 10: ", reason)


def test_rle_that_is_filled_up_with_nan(folder):
    segmentation = folder.content["annotations"][1]["segmentation"]
    segmentation["counts"] = [7.0, 5.0, 36.0, math.nan, math.nan]
    dataset = folder.load()
    (found,) = (a for r in dataset.records for a in r["annotations"] if a["id"] == 2)
    assert found["segmentation"]["counts"] == [7, 5, 36]


def test_parts_that_have_an_area_only_together(folder):
    part = [2, 2, 4, 2, 4, 2.0009]
    del folder.annotation["bbox"]
    folder.annotation["segmentation"] = [part, part]
    dataset = folder.load()
    (found,) = (a for r in dataset.records for a in r["annotations"] if a["id"] == 1)
    assert found["bbox"] == pytest.approx([2, 2, 2, 0.0009])


def test_compressed_rle_is_understood(folder):
    codec = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for size in ((HEIGHT, WIDTH), (300, 200)):
        for density in (0.001, 0.5, 0.999):
            mask = np.asfortranarray(rng.random(size) < density, np.uint8)
            mask[:40] = mask[0, 0]  # long runs and short ones, growing and shrinking
            mask[1, 1] = 1
            counts = codec.encode(mask)["counts"].decode()
            runs = coco_masks._decode_counts(counts)
            decoded = np.repeat(np.arange(len(runs)) % 2, runs)
            assert (decoded == mask.ravel(order="F")).all()
            folder.image.update(height=size[0], width=size[1])
            Image.new("L", size[::-1]).save(folder.images / "a.jpg")
            folder.content["annotations"][1]["segmentation"] = {
                "size": list(size),
                "counts": counts,
            }
            assert len(folder.load().records[0]["annotations"]) == 2


# --- several are wrong -----------------------------------------------------------------------


def test_the_first_ten_of_each_kind_are_listed_and_all_are_counted(folder, caplog):
    folder.content["annotations"] = [
        {**folder.annotation, "id": number, "category_id": 2} for number in range(13)
    ] + [{**folder.annotation, "id": 13, "bbox": [0, 0, -1, 2]}]
    with pytest.raises(ValueError) as caught:
        folder.load()
    first, *lines = map(str.strip, str(caught.value).splitlines())
    assert "found: 14." in first
    assert lines[0] == "unknown category_id: 13" and lines[11] == "and 3 more"
    assert all("no category has the id 2" in line for line in lines[1:11])
    assert lines[12] == "degenerate box: 1" and len(lines) == 14
    dataset = folder.load(on_error="skip")
    assert len(dataset.faults) == 14
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, "one warning for each kind"
    assert re.search(r"because of unknown category_id: 13, the first: annotation 0 ", messages[0])
    assert re.search(r"because of degenerate box: 1, the first: annotation 13 ", messages[1])


# --- image files -----------------------------------------------------------------------------


def truncated(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-60])
    return path


def test_truncated_jpeg(folder, caplog):
    truncated(folder.images / "a.jpg")
    assert len(folder.load().records) == 2, "only found by decoding"
    folder.expect(
        caplog,
        "image 10",
        f"{folder.images / 'a.jpg'} cannot be decoded: image file is truncated",
        images=1,
        annotations=1,
        check_decode=True,
    )


def test_size_in_the_file_differs(folder, caplog):
    folder.content["images"][1].update(height=WIDTH, width=HEIGHT)
    folder.expect(
        caplog,
        "image 20",
        f"{Path('sub', 'b.png')} has height 6 and width 8, recorded are 8 and 6",
        images=1,
        check_decode=True,
    )


def test_the_size_is_that_of_the_upright_image(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    with Image.open(folder.images / "a.jpg") as image:
        image.save(folder.images / "a.jpg", exif=exif)
    folder.image.update(height=WIDTH, width=HEIGHT)
    folder.content["annotations"] = []
    assert len(folder.load(check_decode=True).records) == 2
    assert read_image(folder.images / "a.jpg").shape == (WIDTH, HEIGHT, 3)


def test_unchanged_files_are_not_checked_again(folder, monkeypatch):
    """Faults are remembered as well as their absence; a changed file is read again."""
    folder.annotation["category_id"] = 2
    folder.json_file.write_text(json.dumps(folder.content))
    for path in (folder.json_file, *folder.images.rglob("*.*")):
        os.utime(path, (1e9, 1e9))
    options = {"on_error": "skip", "check_decode": True}
    first = load_coco(folder.json_file, folder.images, **options)
    assert len(first.records[0]["annotations"]) == 1
    calls = []
    find = coco._examine
    monkeypatch.setattr(coco, "_examine", lambda *args: calls.append(1) or find(*args))
    assert load_coco(folder.json_file, folder.images, **options) == first and not calls
    with pytest.raises(ValueError, match="no category has the id 2"):
        load_coco(folder.json_file, folder.images, check_decode=True)
    assert not calls
    truncated(folder.images / "a.jpg")
    assert len(load_coco(folder.json_file, folder.images, **options).faults) == 2 and calls == [1]
