"""What `load_coco` says about a file as a whole: boxes, crowds, categories, and what it changed.

That changed files are evaluated and trained right is tested in `tests/detection/test_formats.py`.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data.coco import load_coco

WIDTH, HEIGHT = 200, 100


@pytest.fixture
def load(tmp_path):
    """``load(content, **options)``"""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)

    def load(content, **options):
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return load_coco(tmp_path / "instances.json", tmp_path, **options)

    return load


def content(num_boxes=40, masks=True, area=True):
    """Boxes all over two images; masks are their diamonds."""
    rng = np.random.default_rng(0)
    annotations = []
    for number in range(1, num_boxes + 1):
        w, h = rng.integers(10, 60, 2).tolist()
        x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
        annotation = {"id": number, "image_id": number % 2, "category_id": 1, "iscrowd": 0}
        annotation["bbox"] = [x, y, w, h]
        if masks:
            points = (x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2)
            annotation["segmentation"] = [[*points]]
        if area:
            annotation["area"] = w * h / 2 if masks else w * h
        annotations.append(annotation)
    return {
        "info": {},
        "images": [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
                   for i, name in enumerate(("a.png", "b.png"))],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}],
    }  # fmt: skip


def to_xyxy(x, y, w, h):
    return [x, y, x + w, y + h]


def to_centre(x, y, w, h):
    return [x + w / 2, y + h / 2, w, h]


def to_fractions(x, y, w, h):
    return [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("area", [True, False])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (to_xyxy, r"they do fit as \[x1, y1, x2, y2\]"),
        (lambda *b: [to_xyxy(*b)[i] for i in (1, 0, 3, 2)], r"they do fit as \[y1, x1, y2, x2\]"),
        (to_fractions, "all 40 boxes have numbers of at most 1.*fractions of the image's size"),
        (lambda *b: to_fractions(*to_xyxy(*b)), "all 40 boxes have numbers of at most 1"),
    ],
)
def test_boxes_of_another_kind(load, masks, area, on_error, convert, reason):
    """Nothing of such a file can be skipped."""
    wrong = content(masks=masks, area=area)
    for annotation in wrong["annotations"]:
        annotation["bbox"] = convert(*annotation["bbox"])
    with pytest.raises(ValueError, match=rf"instances\.json: .*{reason}"):
        load(wrong, on_error=on_error)


def test_centres_disagree_with_masks(load):
    wrong = content()
    for annotation in wrong["annotations"]:
        annotation["bbox"] = to_centre(*annotation["bbox"])
    with pytest.raises(ValueError, match=r"40 of 40 boxes disagree .* as \[x of the centre, y of"):
        load(wrong)


def test_boxes_of_resized_images(load):
    wrong = content()
    for annotation in wrong["annotations"]:
        annotation["bbox"] = [side * 0.4 for side in annotation["bbox"]]
    with pytest.raises(ValueError, match="boxes disagree with their masks; bbox must be"):
        load(wrong)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("num_boxes", [1, 2, 40])
def test_right_boxes_are_no_problem(load, masks, num_boxes):
    dataset = load(content(num_boxes, masks=masks))
    assert not dataset.notes and not dataset.is_changed and not dataset.faults


def test_boxes_that_are_no_problem_all_in_one_corner(load):
    """They would fit as corners as well; boxes of complete objects reach out of the image."""
    right = content(masks=False)
    for number, annotation in enumerate(right["annotations"]):
        annotation["bbox"] = [number / 10, number / 10, 30 + number, 30 + number]
        annotation["area"] = (30 + number) ** 2
    assert not load(right).notes
    for annotation in right["annotations"][:10]:
        annotation["bbox"] = [-50, -20, 80, 50]
    (note,) = load(right).notes
    assert note == "10 of 40 boxes reach out of their image by more than 2 px"


def test_a_few_boxes_of_objects_that_are_cut_off(load):
    """What leaves a small file's images is too little to tell another kind of box from."""
    right = content(4, masks=False)
    for annotation, box in zip(
        right["annotations"],
        ([171, 30, 32, 60], [10, 20, 30, 40], [20, 10, 50, 60], [50, 40, 60, 50]),
        strict=True,
    ):
        annotation.update(bbox=box, area=box[2] * box[3])
    dataset = load(right)
    assert dataset.notes == ["1 of 4 boxes reach out of their image by more than 2 px"]
    assert sum(len(record["annotations"]) for record in dataset.records) == 4


def test_areas_tell_that_boxes_are_no_corners(load):
    """Half of them leave their image, and all would fit as corners."""
    right = content(masks=False)
    for number, annotation in enumerate(right["annotations"]):
        annotation["bbox"] = box = [60, 20, 100 + 2 * number, 70 + number % 9]
        annotation["area"] = box[2] * box[3]
    assert load(right).notes[0].endswith("of 40 boxes reach out of their image by more than 2 px")
    for annotation in right["annotations"]:
        x1, y1, x2, y2 = annotation["bbox"]
        annotation["area"] = (x2 - x1) * (y2 - y1)
    with pytest.raises(ValueError, match=r"they do fit as \[x1, y1, x2, y2\]"):
        load(right)


def test_a_single_box_of_another_kind_is_counted(load):
    mixed = content()
    x, y, w, h = mixed["annotations"][3]["bbox"]
    mixed["annotations"][3]["bbox"] = [x / 2, y, w / 3, h]
    (note,) = load(mixed).notes
    assert note == "1 of 40 boxes disagree with their masks"


@pytest.mark.parametrize(
    "box", [[200, 10, 20, 20], [10, 100, 5, 5], [-30, 4, 30, 9], [4, -9, 9, 8]]
)
def test_a_box_outside_of_the_image(load, box):
    outside = content(masks=False, area=False)
    outside["annotations"][5]["bbox"] = box
    reason = r"annotation 6 of image 0: bbox .*, the image has 200 x 100 pixels"
    with pytest.raises(ValueError, match=rf"box outside of the image: 1\n    {reason}"):
        load(outside)
    dataset = load(outside, on_error="skip")
    assert sum(len(record["annotations"]) for record in dataset.records) == 39
    assert [fault.kind for fault in dataset.faults] == ["box outside of the image"]


# --- what is counted -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, True, "1", 1.0, "true"])
def test_crowds_are_counted(load, value, caplog):
    some = content()
    for annotation in some["annotations"][:3]:
        annotation["iscrowd"] = value
    dataset = load(some)
    assert "3 of 40 annotations are crowds (iscrowd 1): they neither train nor count" in (
        dataset.notes
    )
    crowds = [a["iscrowd"] for r in dataset.records for a in r["annotations"] if a["iscrowd"]]
    assert crowds == [1, 1, 1] and all(type(crowd) is int for crowd in crowds)
    assert not caplog.records, "no warning: COCO has as many"
    for annotation in some["annotations"][:9]:
        annotation["iscrowd"] = value
    load(some)
    assert "9 of 40 annotations are crowds" in caplog.text and "set iscrowd to 0" in caplog.text


def test_changes_are_counted(load):
    changed = content()
    for annotation in changed["annotations"][:4]:
        del annotation["area"]
    changed["annotations"][7]["segmentation"] += [[1, 2, 3, 4], [5, 6]]
    changed["annotations"][9]["id"] = 0
    dataset = load(changed)
    assert dataset.is_changed
    assert sorted(dataset.notes) == [
        "annotation ids are missing, repeated, below 1 or no integers: all 40 annotations were "
        "numbered anew",
        "area is missing or 0, and was computed: 4",
        "stray parts of polygons (below 3 points, or an odd number of numbers) were left out: 2",
    ]
    first = next(a for r in dataset.records for a in r["annotations"] if a["id"] == 1)
    assert first["area"] == first["bbox"][2] * first["bbox"][3] / 2


def test_the_area_of_boxes_and_of_run_lengths(load):
    no_area = content(masks=False, area=False)
    height, width = HEIGHT, WIDTH
    counts = [3 * height + 5, 7, height * (width - 3) - 12]
    no_area["annotations"][0]["segmentation"] = {"size": [height, width], "counts": counts}
    dataset = load(no_area)
    areas = {a["id"]: a["area"] for record in dataset.records for a in record["annotations"]}
    w, h = no_area["annotations"][1]["bbox"][2:]
    assert areas[1] == 7 and areas[2] == w * h


@pytest.mark.parametrize("first_rows", [4, 0])
def test_the_box_of_run_lengths(load, first_rows):
    """One that stays in its columns, and one that runs over the lower edge."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:20, 30:34] = True
    mask[HEIGHT - first_rows :, 33] = first_rows > 0
    mask[:first_rows, 34] = True
    counts, value = [0], 0
    for pixel in mask.ravel(order="F"):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    file = content(num_boxes=1)
    file["annotations"][0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
    del file["annotations"][0]["bbox"]
    (annotation,) = (a for r in load(file).records for a in r["annotations"])
    rows, columns = mask.nonzero()
    x, y = columns.min(), rows.min()
    assert annotation["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]


def test_categories_without_annotations_are_named(load):
    file = content()
    file["categories"].insert(0, {"id": 0, "name": "pets-x1y2", "supercategory": "none"})
    assert load(file).notes == ["1 of 2 categories have no annotation: 'pets-x1y2'"]


def test_one_name_for_several_categories(load):
    """The same class, unless the supercategory says otherwise."""
    file = content()
    file["categories"].append({"id": 5, "name": "cat"})
    file["annotations"][0]["category_id"] = 5
    dataset = load(file)
    assert dataset.categories == [(1, "cat")] and dataset.is_changed
    assert "categories 1 and 5 have the same name 'cat': one class" in dataset.notes
    assert {a["category_id"] for r in dataset.records for a in r["annotations"]} == {1}
    file["categories"] = [{"id": 1, "name": "cat", "supercategory": "animal"},
                          {"id": 5, "name": "cat", "supercategory": "machine"}]  # fmt: skip
    dataset = load(file)
    assert dataset.categories == [(1, "cat (animal)"), (5, "cat (machine)")]
    assert {a["category_id"] for r in dataset.records for a in r["annotations"]} == {1, 5}


@pytest.mark.parametrize("split_is_root", [True, False])
def test_images_that_only_have_a_url(load, tmp_path, split_is_root):
    """As in LVIS, whose file names start with the folder of the split."""
    if not split_is_root:
        (tmp_path / "train2017").mkdir()
        for name in ("a.png", "b.png"):
            (tmp_path / name).rename(tmp_path / "train2017" / name)
    lvis = content()
    for image in lvis["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    dataset = load(lvis)
    folder = tmp_path if split_is_root else tmp_path / "train2017"
    names = [record["file_name"] for record in dataset.records]
    assert names == [str(folder / "a.png"), str(folder / "b.png")]
    assert dataset.notes == ["file_name of images is missing, and was taken from coco_url: 2"]


def test_file_names_with_backslashes(load, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "sub/a.png")
    (tmp_path / "b.png").rename(tmp_path / "c\\b.png")  # as it is, where there is such a file
    windows = content()
    for image, name in zip(windows["images"], ("sub\\a.png", "c\\b.png"), strict=True):
        image["file_name"] = name
    dataset = load(windows)
    found = [record["file_name"] for record in dataset.records]
    assert found == [str(tmp_path / "sub/a.png"), str(tmp_path / "c\\b.png")]
    assert dataset.notes == ["file_name of images has backslashes, and was read with slashes: 1"]


def test_an_image_in_several_entries_is_named(load):
    """As a file for each class has it, when they are put together: each entry misses objects."""
    file = content()
    file["images"].append({**file["images"][0], "id": 2})
    for annotation in file["annotations"][:5]:
        annotation["image_id"] = 2
    (note,) = load(file).notes
    assert note.startswith("1 image files belong to several entries") and "a.png" in note


def test_ids_that_differ_only_in_how_they_are_written(load):
    """They are two images if the file has both."""
    file = content()
    file["images"][0]["id"], file["images"][1]["id"] = "1", "01"
    for annotation in file["annotations"]:
        annotation["image_id"] = "1" if annotation["image_id"] else "01"
    dataset = load(file)
    assert [record["image_id"] for record in dataset.records] == ["1", "01"]
    assert [len(record["annotations"]) for record in dataset.records] == [20, 20]


def test_sizes_that_are_missing_are_those_of_the_files(load):
    file = content()
    for image in file["images"]:
        del image["width"], image["height"]
    dataset = load(file)
    assert {(r["height"], r["width"]) for r in dataset.records} == {(HEIGHT, WIDTH)}
    assert dataset.notes == ["sizes of images are missing or no integers, and were filled in: 2"]


def test_exchanged_sizes_are_found_without_decoding(load):
    file = content()
    file["images"][0].update(width=HEIGHT, height=WIDTH)
    with pytest.raises(ValueError, match=r"wrong image size: 1\n.* has height 100 and width 200, "
                       "recorded are 200 and 100: height and width are exchanged"):  # fmt: skip
        load(file)


def test_annotations_of_images_that_are_skipped_are_counted(load):
    file = content()
    file["images"][0]["file_name"] = "gone.png"
    assert "20 annotations belong to images that are not used" in load(file, on_error="skip").notes


def test_crowds_without_a_mask_are_their_boxes(load):
    """Where masks are evaluated, a crowd needs one."""
    file = content()
    file["annotations"][0].update(iscrowd=1, segmentation=[], bbox=[1, 2, 30, 40])
    (crowd,) = (a for r in load(file).records for a in r["annotations"] if a["iscrowd"])
    assert crowd["segmentation"] == [[1, 2, 31, 2, 31, 42, 1, 42]]


def test_absurd_numbers_are_faults_with_names(load):
    """Larger than what C or NumPy hold."""
    file = content()
    file["annotations"][0]["bbox"] = [0, 0, 10**400, 5]
    file["annotations"][1]["bbox"] = [1e300, 1e300, 1e300, 1e300]
    file["annotations"][2]["image_id"] = 10**400
    file["annotations"][3]["category_id"] = "9" * 5000
    file["annotations"][4]["segmentation"] = [[10**400, 1, 2, 3, 4, 5]]
    file["annotations"][5]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [10**400]}
    file["images"].append({"id": 7, "file_name": "a.png", "height": 10**30, "width": 5})
    dataset = load(file, on_error="skip")
    assert len(dataset.faults) == 7
    assert sum(len(record["annotations"]) for record in dataset.records) == 34
