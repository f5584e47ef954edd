"""About a hundred ways to spoil a clean data set; each must be found and named.

A function gets the root of a fresh copy, spoils it, and returns a word that the finding must have
in its file or message.
"""

from __future__ import annotations

import json
import re
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


# YOLO


def first_label(root: Path) -> Path:
    files = sorted((root / "labels" / "train").iterdir())
    return next(file for file in files if file.read_text().strip())


def on_line(kind: str):
    """The fault is a line's: the function gets the numbers of the first one as words."""

    def add(function: Callable[[list[str]], list[str]]):
        def spoil(root: Path) -> str:
            file = first_label(root)
            first, *others = file.read_text().splitlines()
            file.write_text("\n".join([" ".join(function(first.split())), *others]))
            return file.name

        spoil.__name__ = function.__name__
        return fault("yolo", kind)(spoil)

    return add


@on_line("unknown class")
def class_index_is_too_large(words: list[str]) -> list[str]:
    return ["17", *words[1:]]


@on_line("malformed label line")
def line_has_four_numbers(words: list[str]) -> list[str]:
    return words[:4]


@on_line("malformed label line")
def line_begins_with_a_name(words: list[str]) -> list[str]:
    return ["circle", *words[1:]]


@on_line("coordinates are no fractions")
def coordinates_are_pixels(words: list[str]) -> list[str]:
    return [words[0], "30", "30", "20", "20"]


@on_line("box without area")
def yolo_box_has_no_width(words: list[str]) -> list[str]:
    return [words[0], "0.5", "0.5", "0", "0.2"]


@fault("yolo", "duplicate object")
def yolo_line_is_repeated(root: Path) -> str:
    file = first_label(root)
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    return file.stem


@fault("yolo", "label without image")
def yolo_image_is_missing(root: Path) -> str:
    label = first_label(root)
    next((root / "images" / "train").glob(f"{label.stem}.*")).unlink()
    return label.name


@fault("yolo", "wrong number of classes")
def nc_is_another_number(root: Path) -> str:
    file = root / "data.yaml"
    file.write_text(re.sub(r"nc: \d+", "nc: 3", file.read_text()))
    return "nc is 3"


@fault("yolo", "missing split")
def val_folder_does_not_exist(root: Path) -> str:
    file = root / "data.yaml"
    file.write_text(file.read_text().replace("val: images/val", "val: images/nowhere"))
    return "nowhere"


@fault("yolo", "missing image file")
def list_names_a_missing_image(root: Path) -> str:
    files = [f"./images/train/{f.name}" for f in sorted((root / "images" / "train").iterdir())]
    (root / "train.txt").write_text("\n".join([*files, "./images/train/gone.jpg"]))
    file = root / "data.yaml"
    file.write_text(file.read_text().replace("train: images/train", "train: train.txt"))
    return "gone.jpg"


@fault("yolo", "unreadable label file")
def yolo_labels_are_binary(root: Path) -> str:
    first_label(root).write_bytes(b"\xff\x00\x80\x81")
    return first_name(root / "labels" / "train")


def first_name(folder: Path) -> str:
    return next(f.name for f in sorted(folder.iterdir()) if f.read_bytes()[:1] == b"\xff")


@fault("yolo", "damaged image file")
def yolo_image_is_damaged(root: Path) -> str:
    file = sorted((root / "images" / "train").iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])
    return file.name


# labelme


def on_labelme(kind: str):
    """The function gets the content of a file that has shapes."""

    def add(function: Callable[[dict], None]):
        def spoil(root: Path) -> str:
            file = labelme_file(root)
            content = read_json(file)
            function(content)
            file.write_text(json.dumps(content))
            return file.stem

        spoil.__name__ = function.__name__
        return fault("labelme", kind)(spoil)

    return add


def labelme_file(root: Path) -> Path:
    return next(f for f in sorted((root / "train").glob("*.json")) if read_json(f)["shapes"])


@fault("labelme", "unreadable label file")
def labelme_file_is_cut_off(root: Path) -> str:
    file = labelme_file(root)
    file.write_text(file.read_text()[:-20])
    return file.name


@on_labelme("shape without area")
def labelme_shape_is_a_line(content: dict) -> None:
    content["shapes"].append({"label": "star", "shape_type": "line", "points": [[1, 1], [5, 5]]})


@on_labelme("degenerate polygon")
def labelme_polygon_has_two_points(content: dict) -> None:
    content["shapes"][0]["points"] = content["shapes"][0]["points"][:2]


@on_labelme("malformed annotation")
def labelme_shape_has_no_label(content: dict) -> None:
    del content["shapes"][0]["label"]


@on_labelme("malformed annotation")
def labelme_points_are_no_pairs(content: dict) -> None:
    content["shapes"][0]["points"] = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@on_labelme("wrong image size")
def labelme_size_is_wrong(content: dict) -> None:
    content["imageHeight"] += 7


@fault("labelme", "missing image file")
def labelme_image_is_missing(root: Path) -> str:
    file = labelme_file(root)
    name = read_json(file)["imagePath"]
    (file.parent / name).unlink()
    return name


@fault("labelme", "image without label")
def labelme_file_is_missing(root: Path) -> str:
    file = labelme_file(root)
    file.unlink()
    return file.stem


@fault("labelme", "unknown class")
def labelme_class_is_not_listed(root: Path) -> str:
    labels = {s["label"] for f in root.rglob("*.json") for s in read_json(f)["shapes"]}
    (root / "labels.txt").write_text("\n".join(["__ignore__", *sorted(labels - {"star"})]))
    return "star"


# Pascal VOC


def xml_file(root: Path) -> Path:
    return next(f for f in sorted((root / "Annotations").iterdir()) if "<object>" in f.read_text())


def on_xml(kind: str):
    """The function gets the text of a file that has objects."""

    def add(function: Callable[[str], str]):
        def spoil(root: Path) -> str:
            file = xml_file(root)
            file.write_text(function(file.read_text()))
            return file.stem

        spoil.__name__ = function.__name__
        return fault("voc", kind)(spoil)

    return add


@on_xml("unreadable label file")
def xml_is_cut_off(text: str) -> str:
    return text[:-30]


@on_xml("degenerate box")
def voc_corners_are_exchanged(text: str) -> str:
    box = "<xmin>30</xmin><ymin>30</ymin><xmax>10</xmax><ymax>20</ymax>"
    return re.sub(r"<xmin>.*?</ymax>", box, text, count=1)


@on_xml("malformed annotation")
def voc_object_has_no_name(text: str) -> str:
    return re.sub(r"<name>.*?</name>", "", text, count=1)


@on_xml("wrong image size")
def voc_size_is_wrong(text: str) -> str:
    return re.sub(r"<width>\d+", "<width>777", text)


@on_xml("box leaves the image")
def voc_box_reaches_out(text: str) -> str:
    return re.sub(r"<xmax>[\d.]+", "<xmax>150", text, count=1)


@fault("voc", "image without label")
def xml_is_missing(root: Path) -> str:
    file = xml_file(root)
    file.unlink()
    return file.stem


@fault("voc", "listed name without label")
def list_names_a_missing_xml(root: Path) -> str:
    with (root / "ImageSets/Main/train.txt").open("a") as file:
        file.write("nothing\n")
    return "nothing"


@fault("voc", "label in no split")
def list_leaves_out_an_xml(root: Path) -> str:
    file = root / "ImageSets/Main/train.txt"
    first, *others = file.read_text().split()
    file.write_text("\n".join(others))
    return first


@fault("voc", "other file name")
def xml_names_another_image(root: Path) -> str:
    files = sorted((root / "Annotations").iterdir())
    text = files[0].read_text()
    files[0].write_text(text.replace(f"<filename>{files[0].stem}", f"<filename>{files[1].stem}"))
    return files[0].name


# Label maps


def label_files(root: Path, split: str = "train") -> list[Path]:
    return sorted((root / "labels" / split).iterdir())


def on_label(kind: str):
    """The function changes class indices, ``uint8[H, W]``, in which 255 is ignored."""

    def add(function: Callable[[np.ndarray], np.ndarray]):
        def spoil(root: Path) -> str:
            file = label_files(root)[0]
            label = function(np.array(Image.open(file)))
            Image.fromarray(label).save(file, "TIFF" if label.dtype.kind == "f" else "PNG")
            return file.name

        spoil.__name__ = function.__name__
        return fault("masks", kind)(spoil)

    return add


@on_label("impossible label")
def label_has_an_unknown_value(label: np.ndarray) -> np.ndarray:
    label[:4, :4] = 99
    return label


@on_label("wrong size")
def label_has_another_size(label: np.ndarray) -> np.ndarray:
    return label[:-3]


@on_label("wrong size")
def label_is_turned(label: np.ndarray) -> np.ndarray:
    return np.rot90(np.pad(label, ((0, 0), (0, 5))))


@on_label("label map without a class")
def label_is_ignored_everywhere(label: np.ndarray) -> np.ndarray:
    return np.full_like(label, 255)


@on_label("unreadable label file")
def label_has_fractions(label: np.ndarray) -> np.ndarray:
    return label.astype(np.float32) / 2


@on_label("unreadable label file")
def label_is_drawn_in_colours(label: np.ndarray) -> np.ndarray:
    return np.stack([label * 20, label, label], axis=2)


@fault("masks", "unreadable label file")
def label_is_cut_off(root: Path) -> str:
    file = label_files(root)[0]
    file.write_bytes(file.read_bytes()[:-40])
    return file.name


@fault("masks", "unreadable label file")
def label_is_a_jpeg(root: Path) -> str:
    file = label_files(root)[0]
    Image.open(file).save(file, "JPEG")
    return file.name


@fault("masks", "image without label")
def label_is_missing(root: Path) -> str:
    file = label_files(root)[0]
    file.unlink()
    return file.stem


@fault("masks", "label without image")
def label_has_no_image(root: Path) -> str:
    file = label_files(root)[0]
    shutil.copy(file, file.with_name("stray.png"))
    return "stray"


@fault("masks", "several files of one name")
def two_images_have_one_label(root: Path) -> str:
    file = sorted((root / "images" / "train").iterdir())[0]
    Image.open(file).save(file.with_suffix(".png"))
    return file.name


@fault("masks", "unreadable image file")
def image_of_a_label_is_damaged(root: Path) -> str:
    file = sorted((root / "images" / "train").iterdir())[0]
    file.write_bytes(b"\xff\xd8\xff nothing")
    return file.name


@fault("masks", "one label map of two images")
def label_is_copied_to_another_image(root: Path) -> str:
    first, second = label_files(root)[:2]
    images = [next((root / "images" / "train").glob(f"{f.stem}.*")) for f in (first, second)]
    label = np.array(Image.open(first))
    with Image.open(images[1]) as image:
        image.resize(label.shape[::-1]).save(images[1])
    shutil.copy(first, second)
    return second.name


@fault("masks", "class missing from training")
def training_labels_have_none_of_a_class(root: Path) -> str:
    for split in ("train", "val"):
        for file in label_files(root, split):
            label = np.array(Image.open(file))
            if split == "train":
                label[label == 5] = 0
            else:
                label[:3, :3] = 5
            Image.fromarray(label).save(file)
    return "thing 5"


@fault("masks", "similar class names")
def classes_of_labels_differ_in_hyphens(root: Path) -> str:
    file = root / "classes.txt"
    file.write_text(file.read_text().replace("thing 3", "thing-2"))
    return "thing-2"


@fault("colours", "impossible label")
def label_has_an_unknown_colour(root: Path) -> str:
    file = label_files(root)[0]
    label = np.array(Image.open(file))
    label[:4, :4] = 123
    Image.fromarray(label).save(file)
    return "#7b7b7b"


# Class folders


def class_files(root: Path, split: str = "train", name: str = "circle") -> list[Path]:
    return sorted((root / split / name).iterdir())


@fault("class_folders", "empty class")
def class_has_no_image(root: Path) -> str:
    (root / "train" / "hexagon").mkdir()
    return "hexagon"


@fault("class_folders", "image in no class")
def image_is_in_no_class_folder(root: Path) -> str:
    class_files(root)[0].rename(root / "train" / "stray.jpg")
    return "stray.jpg"


@fault("class_folders", "one image with different labels")
def image_is_in_two_classes(root: Path) -> str:
    shutil.copy(class_files(root)[0], root / "train" / "star" / "twin.jpg")
    return "twin.jpg"


@fault("class_folders", "duplicate images in two splits")
def image_of_a_class_leaks(root: Path) -> str:
    shutil.copy(class_files(root)[0], root / "val" / "circle" / "twin.jpg")
    return "twin.jpg"


@fault("class_folders", "damaged image file")
def image_of_a_class_is_damaged(root: Path) -> str:
    file = class_files(root)[0]
    file.write_bytes(file.read_bytes()[:200])
    return file.name


@fault("class_folders", "class missing from training")
def class_is_only_in_val(root: Path) -> str:
    (root / "val" / "circle").rename(root / "val" / "ring")
    return "ring"


@fault("class_folders", "similar class names")
def class_folders_differ_in_capitals(root: Path) -> str:
    (root / "train" / "Circle").mkdir()
    class_files(root)[0].rename(root / "train" / "Circle" / "x.jpg")
    return "Circle"
