"""About a hundred ways to spoil a clean data set; each must be found and named.

A function gets the root of a fresh copy, spoils it, and returns a word that the finding must have
in its file or message.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.data.sample_coco import mask_to_rle

Spoil = Callable[[Path], str]
FAULTS: list[tuple[str, str, str, Spoil]] = []  # base, name, kind of the finding, function


def fault(base: str, kind: str) -> Callable[[Spoil], Spoil]:
    def add(function: Spoil) -> Spoil:
        FAULTS.append((base, function.__name__.strip("_"), kind, function))
        return function

    return add


# COCO


@contextmanager
def edited(root: Path, split: str = "train"):
    file = root / f"{split}.json"
    content = read_json(file)
    yield content
    file.write_text(json.dumps(content))


def name_of(content: dict[str, Any], annotation: dict[str, Any]) -> str:
    return next(i["file_name"] for i in content["images"] if i["id"] == annotation["image_id"])


def largest(content: dict[str, Any]) -> dict[str, Any]:
    return max(content["annotations"], key=lambda a: a["area"])


def image_file(root: Path, position: int = 0, split: str = "train") -> Path:
    return root / "images" / read_json(root / f"{split}.json")["images"][position]["file_name"]


def on_image(base: str, kind: str):
    """The fault is a file's: the function gets an image file."""

    def add(function: Callable[[Path], None]):
        def spoil(root: Path) -> str:
            file = image_file(root)
            function(file)
            return file.name

        spoil.__name__ = function.__name__
        return fault(base, kind)(spoil)

    return add


def on_annotation(kind: str):
    """The fault is an object's: the function gets the annotation, and its image's entry."""

    def add(function: Callable[[dict, dict], None]):
        def spoil(root: Path) -> str:
            with edited(root) as content:
                annotation = largest(content)
                name = name_of(content, annotation)
                image = next(i for i in content["images"] if i["file_name"] == name)
                function(annotation, image)
            return name

        spoil.__name__ = function.__name__
        return fault("coco", kind)(spoil)

    return add


def on_content(kind: str):
    """The fault is of the training file: the function gets its content, and returns a word."""

    def add(function: Callable[[dict], str]):
        def spoil(root: Path) -> str:
            with edited(root) as content:
                return function(content)

        spoil.__name__ = function.__name__
        return fault("coco", kind)(spoil)

    return add


@on_image("coco", "missing image file")
def image_is_missing(file: Path) -> None:
    file.unlink()


@on_image("coco", "damaged image file")
def image_is_cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-300])


@on_image("coco", "damaged image file")
def image_is_a_text(file: Path) -> None:
    file.write_text("404 not found")


@on_image("coco", "damaged image file")
def image_is_empty(file: Path) -> None:
    file.write_bytes(b"")


@on_image("coco", "damaged image file")
def image_has_12_of_16_bits(file: Path) -> None:
    height, width = np.asarray(Image.open(file)).shape[:2]
    values = np.random.default_rng(0).integers(0, 4096, (height, width)).astype(np.uint16)
    Image.fromarray(values).save(file, "PNG")


@on_image("coco", "blank image")
def image_is_blank(file: Path) -> None:
    Image.new("RGB", Image.open(file).size, (9, 9, 9)).save(file)


@on_image("coco", "wrong file suffix")
def image_is_a_png_called_jpg(file: Path) -> None:
    Image.open(file).save(file, "PNG")


@on_image("coco", "ambiguous orientation")
def image_is_turned_by_180_degrees(file: Path) -> None:
    _with_orientation(file, 3)


@on_image("coco", "wrong image size")
def image_lies_on_its_side(file: Path) -> None:
    image = Image.open(file)
    if image.width == image.height:
        raise AssertionError("needs an image that is no square")
    _with_orientation(file, 6)


def _with_orientation(file: Path, value: int) -> None:
    image = Image.open(file)
    exif = image.getexif()
    exif[0x0112] = value
    image.save(file, exif=exif)


@on_content("wrong image size")
def recorded_size_is_wrong(content: dict) -> str:
    content["images"][0]["width"] += 10
    return content["images"][0]["file_name"]


@on_content("wrong image size")
def recorded_sides_are_exchanged(content: dict) -> str:
    image = next(i for i in content["images"] if i["width"] != i["height"])
    image["width"], image["height"] = image["height"], image["width"]
    return image["file_name"]


@on_content("malformed image")
def recorded_size_is_negative(content: dict) -> str:
    content["images"][0]["height"] = -5
    return content["images"][0]["file_name"]


@on_content("malformed image")
def image_has_no_file_name(content: dict) -> str:
    del content["images"][0]["file_name"]
    return "file_name"


@on_content("repeated image id")
def image_ids_repeat(content: dict) -> str:
    content["images"][1]["id"] = content["images"][0]["id"]
    return content["images"][1]["file_name"]


@on_content("image in several entries")
def one_image_has_two_entries(content: dict) -> str:
    content["images"].append({**content["images"][0], "id": 10_000})
    return content["images"][0]["file_name"]


@on_content("unknown image_id")
def annotation_of_no_image(content: dict) -> str:
    content["annotations"][0]["image_id"] = 77_777
    return "77777"


@on_annotation("unknown category_id")
def annotation_of_no_class(annotation: dict, image: dict) -> None:
    annotation["category_id"] = 999


@on_annotation("malformed annotation")
def iscrowd_is_7(annotation: dict, image: dict) -> None:
    annotation["iscrowd"] = 7


@on_content("malformed annotation")
def annotation_is_a_list(content: dict) -> str:
    content["annotations"].append([1, 2, 3])
    return "[1, 2, 3]"


@on_content("repeated annotation")
def annotation_is_repeated(content: dict) -> str:
    content["annotations"].append(dict(content["annotations"][0]))
    return name_of(content, content["annotations"][0])


@on_content("duplicate object")
def object_is_there_twice(content: dict) -> str:
    content["annotations"].append({**largest(content), "id": 10_000})
    return name_of(content, largest(content))


@on_content("duplicate object")
def object_is_there_twice_shifted_by_half_a_pixel(content: dict) -> str:
    first = largest(content)
    x, y, w, h = first["bbox"]
    moved = [[v + 0.5 for v in polygon] for polygon in first["segmentation"]]
    content["annotations"].append(
        {**first, "id": 10_000, "bbox": [x + 0.5, y + 0.5, w, h], "segmentation": moved}
    )
    return name_of(content, first)


@on_content("object with two classes")
def object_has_two_classes(content: dict) -> str:
    first = largest(content)
    other = next(c["id"] for c in content["categories"] if c["id"] != first["category_id"])
    content["annotations"].append({**first, "id": 10_000, "category_id": other})
    return name_of(content, first)


@on_annotation("box without area")
def box_has_no_width(annotation: dict, image: dict) -> None:
    annotation["bbox"][2] = 0
    annotation["segmentation"] = []


@on_annotation("degenerate box")
def box_has_negative_height(annotation: dict, image: dict) -> None:
    annotation["bbox"][3] *= -1


@on_annotation("degenerate box")
def box_is_not_a_number(annotation: dict, image: dict) -> None:
    annotation["bbox"][0] = float("nan")


@on_annotation("degenerate box")
def box_has_three_numbers(annotation: dict, image: dict) -> None:
    annotation["bbox"] = annotation["bbox"][:3]


@on_annotation("box outside of the image")
def box_is_outside(annotation: dict, image: dict) -> None:
    annotation["bbox"][0] = image["width"] + 40
    annotation["segmentation"] = []


@on_annotation("box leaves the image")
def box_reaches_out(annotation: dict, image: dict) -> None:
    annotation["bbox"][2] = image["width"] + 20
    annotation["segmentation"] = []


@on_annotation("box and mask disagree")
def box_is_another_one_than_the_masks(annotation: dict, image: dict) -> None:
    annotation["bbox"] = [1, 1, 5, 5]


@on_annotation("degenerate polygon")
def polygon_has_two_points(annotation: dict, image: dict) -> None:
    annotation["segmentation"] = [[1, 1, 9, 9]]


@on_annotation("degenerate polygon")
def polygon_is_a_line(annotation: dict, image: dict) -> None:
    annotation["segmentation"] = [[1, 1, 5, 5, 9, 9]]


@on_annotation("degenerate polygon")
def polygon_holds_a_word(annotation: dict, image: dict) -> None:
    annotation["segmentation"] = [[1, 1, 5, "x", 9, 2]]


@on_annotation("stray polygon part")
def polygon_has_a_stray_part(annotation: dict, image: dict) -> None:
    annotation["segmentation"].append([3, 3, 4, 4])


@on_annotation("polygon crosses itself")
def polygon_is_a_bow_tie(annotation: dict, image: dict) -> None:
    x, y, w, h = annotation["bbox"]
    annotation["segmentation"] = [[x, y, x + w, y + h, x + w, y, x, y + 0.9 * h]]
    annotation["area"] = w * h / 2


@on_annotation("polygon leaves the image")
def polygon_reaches_out(annotation: dict, image: dict) -> None:
    annotation["segmentation"][0][0] = image["width"] + 30


def _rle(image: dict) -> dict:
    mask = np.zeros((image["height"], image["width"]), bool)
    mask[5:15, 5:15] = True
    return mask_to_rle(mask)


@on_annotation("wrong RLE")
def rle_is_of_another_size(annotation: dict, image: dict) -> None:
    rle = _rle(image)
    annotation["segmentation"] = {**rle, "size": [rle["size"][0] + 1, rle["size"][1]]}


@on_annotation("wrong RLE")
def rle_is_cut_off(annotation: dict, image: dict) -> None:
    rle = _rle(image)
    annotation["segmentation"] = {**rle, "counts": rle["counts"][:-1]}


@on_annotation("wrong RLE")
def rle_marks_nothing(annotation: dict, image: dict) -> None:
    size = [image["height"], image["width"]]
    annotation["segmentation"] = {"size": size, "counts": [size[0] * size[1]]}


@on_annotation("tiny object")
def object_is_smaller_than_a_pixel(annotation: dict, image: dict) -> None:
    x, y, _, _ = annotation["bbox"]
    annotation |= {"bbox": [x, y, 0.5, 0.5], "segmentation": [], "area": 0.25}


@on_annotation("wrong area")
def area_is_that_of_the_image(annotation: dict, image: dict) -> None:
    annotation["area"] = image["height"] * image["width"]


@on_content("boxes in another form")
def boxes_are_corners(content: dict) -> str:
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x, y, x + w, y + h]
    return "x1, y1, x2, y2"


@on_content("boxes in another form")
def boxes_have_centres(content: dict) -> str:
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["bbox"] = [x + w / 2, y + h / 2, w, h]
    return "centre"


@on_content("boxes in another form")
def boxes_are_fractions(content: dict) -> str:
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    for a in content["annotations"]:
        a["bbox"] = [v / sizes[a["image_id"]][i % 2] for i, v in enumerate(a["bbox"])]
    return "fractions"


@on_content("repeated category id")
def category_ids_repeat(content: dict) -> str:
    content["categories"].append({"id": content["categories"][0]["id"], "name": "another"})
    return "category"


@on_content("classes of one name")
def two_categories_have_one_name(content: dict) -> str:
    content["categories"].append({"id": 500, "name": content["categories"][0]["name"]})
    return content["categories"][0]["name"]


@on_content("malformed category")
def category_has_no_name(content: dict) -> str:
    content["categories"].append({"id": 500})
    return "500"


@fault("coco", "similar class names")
def class_names_differ_in_capitals(root: Path) -> str:
    for split in ("train", "val"):
        with edited(root, split) as content:
            content["categories"].append(
                {"id": 500, "name": content["categories"][0]["name"].upper() + " "}
            )
    return content["categories"][0]["name"].upper()


@fault("coco", "classes differ between splits")
def val_has_other_classes(root: Path) -> str:
    with edited(root, "val") as content:
        content["categories"][0]["name"] = "something else"
    return "something else"


@fault("coco", "class missing from training")
def training_has_none_of_a_class(root: Path) -> str:
    with edited(root, "val") as content:
        chosen = content["categories"][0]
        for image in content["images"]:  # in each one, an object of that class
            annotation = {"id": 1000 + image["id"], "image_id": image["id"], "iscrowd": 0}
            annotation |= {"category_id": chosen["id"], "bbox": [2, 3, 20, 18], "area": 360}
            content["annotations"].append(annotation)
    with edited(root) as content:
        content["annotations"] = [
            a for a in content["annotations"] if a["category_id"] != chosen["id"]
        ]
    return chosen["name"]


@on_content("many crowds")
def brush_masks_are_crowds(content: dict) -> str:
    for a in content["annotations"][::2]:
        a["iscrowd"] = 1
    return "iscrowd"


def _copy_image(root: Path, split: str, change: Callable[[Path, Path], None]) -> str:
    """Another entry in ``split`` for a changed copy of the first training image."""
    source = image_file(root)
    target = source.with_name("another_one.jpg")
    change(source, target)
    with Image.open(target) as image:
        entry = {"id": 10_000, "file_name": target.name, "width": image.width,
                 "height": image.height}  # fmt: skip
    with edited(root, split) as content:
        content["images"].append(entry)
    return target.name


def _smaller(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        size = round(0.8 * image.width), round(0.8 * image.height)
        image.resize(size, Image.Resampling.BICUBIC).save(target, quality=80)


@fault("coco", "duplicate images")
def image_is_there_twice(root: Path) -> str:
    return _copy_image(root, "train", shutil.copyfile)


@fault("coco", "duplicate images in two splits")
def training_image_is_in_val(root: Path) -> str:
    return _copy_image(root, "val", shutil.copyfile)


@fault("coco", "similar images")
def image_is_there_in_two_sizes(root: Path) -> str:
    return _copy_image(root, "train", _smaller)


@fault("coco", "similar images in two splits")
def training_image_is_in_val_in_another_size(root: Path) -> str:
    return _copy_image(root, "val", _smaller)


@fault("coco", "extreme image shape")
def image_is_a_line_scan(root: Path) -> str:
    def change(source: Path, target: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (9, 600, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(target)

    return _copy_image(root, "train", change)


@fault("coco", "names that clash")
def names_differ_in_their_suffix_only(root: Path) -> str:
    source = image_file(root, 1)
    target = image_file(root).with_suffix(".png")
    Image.open(source).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(target)
    with Image.open(target) as image, edited(root) as content:
        content["images"].append({"id": 10_000, "file_name": target.name, "width": image.width,
                                  "height": image.height})  # fmt: skip
    return target.name


@fault("coco", "image without entry")
def image_is_in_no_file(root: Path) -> str:
    _smaller(image_file(root), root / "images" / "forgotten.jpg")
    return "forgotten.jpg"
