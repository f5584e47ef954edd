"""More of :mod:`~tests.data.checks.planted_faults`: in the other formats than COCO."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from spatial_mamba_d2.data.json_file import read_json
from tests.data.checks.planted_faults import fault

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
