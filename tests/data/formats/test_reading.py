"""One content in every format gives identical records."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data.coco import load_coco
from spatial_mamba_d2.data.formats import (
    Instances,
    LabelledData,
    UnusableDataError,
    read_data,
    split_data,
)
from spatial_mamba_d2.data.label_conventions import voc_color
from spatial_mamba_d2.data.label_maps import distinct_colors, read_pair
from tests.data.formats import writers
from tests.data.formats.writers import INSTANCE_WRITERS, Source, write_classes, write_maps


def instance_records(data: LabelledData, tmp_path: Path, *, masks: bool) -> dict:
    """Split -> name of the image -> its size and objects, after our checks."""
    found = {}
    for split, part in data.splits.items():
        assert isinstance(part, Instances)
        file = tmp_path / f"{data.format}_{split}.json"
        file.write_text(json.dumps({"info": {}, **part.content}))
        dataset = load_coco(file, part.image_root)
        names = dict(dataset.categories)
        found[split] = {
            Path(record["file_name"]).name: (
                record["height"],
                record["width"],
                sorted(
                    (
                        names[a["category_id"]],
                        [float(v) for v in a["bbox"]],
                        [[float(v) for v in p] for p in a["segmentation"]] if masks else None,
                    )
                    for a in record["annotations"]
                ),
            )
            for record in dataset.records
        }
    return found


def expected(source: Source, *, masks: bool) -> dict:
    return {
        split: {
            path.name: (
                *size,
                sorted(
                    (
                        name,
                        [float(v) for v in box],
                        [[float(v) for v in polygon]] if masks else None,
                    )
                    for name, box, polygon in objects
                ),
            )
            for path, size, objects in images
        }
        for split, images in source.images.items()
    }


@pytest.fixture(params=["shape_source", "coco_source"])
def source(request) -> Source:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", INSTANCE_WRITERS)
def test_objects_are_the_same_in_every_format(name, source, tmp_path):
    write, holds_masks = INSTANCE_WRITERS[name]
    if name == "huggingface":
        pytest.importorskip("datasets.features", reason="the package datasets is not installed")
    for masks in {holds_masks, False}:
        root = tmp_path / f"masks_{masks}"
        root.mkdir()
        write(source, root, masks=masks)
        data = read_data(root, extract_to=tmp_path / "extracted")
        assert (data.format, data.task) == (name, "detection")
        assert sorted(data.classes) == source.classes
        assert data.findings == []
        assert instance_records(data, tmp_path, masks=masks) == expected(source, masks=masks)


def test_a_coco_file_alone_is_enough_and_is_split(source, tmp_path):
    writers.write_coco(source, tmp_path, one_file=True)
    for path in (tmp_path, tmp_path / "all.json"):
        data = read_data(path)
        assert list(data.splits) == ["all"]
    split = split_data(data)
    assert list(split.splits) == ["train", "val"]
    assert split.num_images == data.num_images
    both = instance_records(split, tmp_path, masks=True)
    everything = {k: v for part in expected(source, masks=True).values() for k, v in part.items()}
    assert both["train"] | both["val"] == everything
    assert 0.1 <= len(both["val"]) / data.num_images <= 0.3
    assert "share 0.2, seed 0" in split.split_rule


def test_the_tree_of_the_shapes_is_read_for_both_tasks(shapes):
    data = read_data(shapes)
    assert (data.format, data.task) == ("coco", "detection")
    assert {split: len(data.image_files(split)) for split in data.splits} == {"train": 12, "val": 5}
    assert "ade20k (segmentation)" in data.notes[-1]
    data = read_data(shapes, task="segmentation")
    assert (data.format, len(data.classes), data.labels.offset) == ("ade20k", 6, 1)


def test_real_trees_are_recognised(coco_mini):
    data = read_data(coco_mini)
    assert (data.format, len(data.classes)) == ("coco", 80)
    assert {split: len(data.image_files(split)) for split in data.splits} == {
        "train": 130,
        "val": 80,
    }
    assert all(file.is_file() for split in data.splits for file in data.image_files(split))


# Label maps

ADE = "images/{split}/{name}{suffix}", "annotations/{split}/{name}.png"


def grey(offset: int):
    def save(indices: np.ndarray) -> Image.Image:
        return Image.fromarray((indices + offset).astype(np.uint8))

    return save


def with_palette(indices: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette([channel for index in range(256) for channel in voc_color(index)])
    return image


def in_colors(indices: np.ndarray) -> Image.Image:
    table = np.full((256, 3), 255, np.uint8)
    table[:60] = distinct_colors(60)
    return Image.fromarray(table[indices])


def color_table(names) -> str:
    rows = zip(distinct_colors(60), names, strict=False)
    lines = [f"{r} {g} {b}\t{name}" for (r, g, b), name in rows]
    return "\n".join([*lines, "255 255 255\tvoid"])


def object_info(names) -> str:
    lines = [f"{i}\t0.1\t1\t1\t{name}" for i, name in enumerate(names, start=1)]
    return "\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines])


MAPS = {
    "ade20k": (*ADE, grey(1), "objectInfo.txt", object_info),
    "ade20k from 0": (*ADE, grey(0), "classes.txt", "\n".join),
    "masks in splits": ("{split}/images/{name}{suffix}", "{split}/masks/{name}.png", grey(0),
                        "classes.txt", "\n".join),
    "palette": ("images/{split}/{name}{suffix}", "labels/{split}/{name}.png", with_palette,
                "names.txt", "\n".join),
    "side by side": ("{split}/{name}{suffix}", "{split}/{name}_mask.png", grey(0),
                     "classes.txt", "\n".join),
    "suffixes": ("images/{split}/{name}{suffix}", "masks/{split}/{name}_seg.png", grey(0),
                 "classes.txt", "\n".join),
    "colours": ("images/{split}/{name}{suffix}", "masks/{split}/{name}.png", in_colors,
                "label_colors.txt", color_table),
    "cityscapes": ("leftImg8bit/{split}/a/{name}_leftImg8bit{suffix}",
                   "gtFine/{split}/a/{name}_gtFine_labelIds.png", grey(0), "classes.txt",
                   "\n".join),
}  # fmt: skip


def map_records(data: LabelledData) -> dict:
    return {
        split: {
            pair.image.stem.replace("_leftImg8bit", ""): read_pair(pair, data.labels)[1].tobytes()
            for pair in pairs
        }
        for split, pairs in data.splits.items()
    }


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", ["shape_maps", "ade_maps"])
def test_label_maps_are_the_same_in_every_layout(name, kind, request, tmp_path):
    maps = request.getfixturevalue(kind)
    num_classes = 6 if kind == "shape_maps" else 150
    if kind == "ade_maps" and name == "colours":
        maps = {s: [(p, np.where(i < 60, i, 255).astype(np.uint8)) for p, i in m]
                for s, m in maps.items()}  # fmt: skip
        num_classes = 60
    image, label, save, name_file, text = MAPS[name]
    names = [f"thing {index}" for index in range(num_classes)]
    write_maps(maps, tmp_path, image, label, save)
    (tmp_path / name_file).write_text(text(names))
    data = read_data(tmp_path)
    assert data.task == "segmentation"
    assert data.format == ("ade20k" if name.startswith("ade20k") else "masks")
    assert data.findings == []
    assert list(data.classes) == names
    want = {s: {p.stem: i.astype(np.uint8).tobytes() for p, i in m} for s, m in maps.items()}
    assert map_records(data) == want


def test_masks_of_0_and_255(shape_maps, tmp_path):
    binary = {s: [(p, (i > 0) & (i < 255)) for p, i in m] for s, m in shape_maps.items()}
    write_maps(binary, tmp_path, "images/{name}{suffix}", "masks/{name}.png",
               lambda mask: Image.fromarray(mask.astype(np.uint8) * 255))  # fmt: skip
    data = read_data(tmp_path)
    assert data.classes == ("background", "foreground")
    split = split_data(data)
    assert sorted(split.splits) == ["train", "val"]
    assert set(np.unique(read_pair(data.splits["all"][0], data.labels)[1])) <= {0, 1}


def test_voc_masks(shape_maps, tmp_path):
    write_maps(shape_maps, tmp_path, "JPEGImages/{name}{suffix}", "SegmentationClass/{name}.png",
               with_palette)  # fmt: skip
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(p.stem for p, _ in shape_maps["train"][5:]))
    (lists / "val.txt").write_text("\n".join(p.stem for p, _ in shape_maps["val"]))
    data = read_data(tmp_path)
    assert (data.format, data.task, len(data.classes)) == ("voc", "segmentation", 21)
    assert [len(pairs) for pairs in data.splits.values()] == [7, 5]


def test_masks_that_datasets_has_saved(shape_maps, tmp_path):
    pytest.importorskip("datasets.features", reason="the package datasets is not installed")
    import datasets

    parts = {}
    for split, pairs in shape_maps.items():
        files = []
        for path, indices in pairs:
            file = tmp_path / "masks" / f"{path.stem}.png"
            file.parent.mkdir(exist_ok=True)
            grey(0)(indices).save(file)
            files.append({"image": {"bytes": path.read_bytes(), "path": path.name},
                          "mask": {"bytes": file.read_bytes(), "path": file.name}})  # fmt: skip
        features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
        parts[split] = datasets.Dataset.from_list(files, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    data = read_data(tmp_path / "saved", extract_to=tmp_path / "extracted")
    assert (data.format, data.task) == ("huggingface", "segmentation")
    want = {s: {p.stem: i.astype(np.uint8).tobytes() for p, i in m} for s, m in shape_maps.items()}
    assert map_records(data) == want


# Classes


def class_samples(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    return {
        split: [(file, file.parent.name) for file in sorted((folder / split).rglob("*.jpg"))]
        for split in ("train", "val")
    }


def class_records(data: LabelledData) -> dict:
    return {
        split: sorted((data.classes[s.target], s.path.read_bytes()) for s in samples)
        for split, samples in data.splits.items()
    }


def test_class_folders(sample_images, tmp_path):
    samples = class_samples(sample_images)
    want = {s: sorted((name, p.read_bytes()) for p, name in of) for s, of in samples.items()}
    assert class_records(read_data(sample_images)) == want
    everything = sorted(x for of in want.values() for x in of)
    unsplit = {"": [(p, name) for of in samples.values() for p, name in of]}
    for p, name in unsplit[""]:
        writers.place(p, tmp_path / "unsplit" / name / f"{p.parent.parent.name}_{p.name}")
    data = read_data(tmp_path / "unsplit")
    assert data.format == "class_folders"
    assert class_records(data) == {"all": everything}
    split = split_data(data)
    both = class_records(split)
    assert sorted(both["train"] + both["val"]) == everything
    assert {name for name, _ in both["val"]} == set(data.classes)  # each class is split


def test_classes_that_datasets_has_saved(sample_images, tmp_path):
    pytest.importorskip("datasets.features", reason="the package datasets is not installed")
    import datasets

    samples = class_samples(sample_images)
    names = sorted({name for of in samples.values() for _, name in of})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    parts = {
        split: datasets.Dataset.from_list(
            [{"image": {"bytes": p.read_bytes(), "path": None}, "label": names.index(name)}
             for p, name in of], features=features)
        for split, of in samples.items()
    }  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    data = read_data(tmp_path / "saved", extract_to=tmp_path / "extracted")
    assert class_records(data) == class_records(read_data(write_classes(samples, tmp_path / "f")))
    with pytest.raises(ValueError, match="folder must be named"):
        read_data(tmp_path / "saved")


# Splits


def test_a_split_depends_on_names_only(source, tmp_path):
    names = []
    for folder in ("one", "two"):
        root = tmp_path / folder
        writers.write_coco(source, root, one_file=True)
        if folder == "two":
            content = json.loads((root / "all.json").read_text())
            random.Random(1).shuffle(content["images"])
            (root / "all.json").write_text(json.dumps(content))
        data = split_data(read_data(root))
        names.append({s: {f.name for f in data.image_files(s)} for s in data.splits})
    assert names[0] == names[1]
    other = split_data(read_data(root), seed=1)
    assert {f.name for f in other.image_files("val")} != names[0]["val"]


@pytest.mark.parametrize("way", ["folder", "prefix of names"])
def test_groups_stay_together(way, shape_source, tmp_path):
    images = shape_source.images["train"]
    for index, (path, _, _) in enumerate(images):
        camera = f"cam{index % 6}"
        name = f"{camera}/{index:04d}.jpg" if way == "folder" else f"{camera}_{index:04d}.jpg"
        writers.place(path, tmp_path / "images" / name)
        label = (tmp_path / "labels" / name).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "classes.txt").write_text("shape\n")
    data = split_data(read_data(tmp_path))
    assert way in data.split_rule
    cameras = [
        {(f.parent.name if way == "folder" else f.name[:4]) for f in data.image_files(split)}
        for split in ("train", "val")
    ]
    assert cameras[0] and cameras[1] and not cameras[0] & cameras[1]


def test_test_images_become_val_if_there_are_no_others(shape_source, tmp_path):
    renamed = Source(shape_source.classes, {"train": shape_source.images["train"],
                                            "test": shape_source.images["val"]})  # fmt: skip
    writers.write_coco(renamed, tmp_path)
    data = split_data(read_data(tmp_path))
    assert len(data.image_files("val")) == 5
    assert data.split_rule == "the split test is used as val"


# What cannot be read


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root) or root.mkdir(), "in no known format"),
        (lambda root: (root / "train.json").write_text('{"images": [], "annotations": ['), "JSON"),
        (lambda root: shutil.copy(root / "train.json", root / "training2.json"), "2 COCO files"),
    ],
)
def test_unusable_data_are_named(spoil, message, shape_source, tmp_path):
    root = tmp_path / "data"
    writers.write_coco(shape_source, root)
    spoil(root)
    with pytest.raises(ValueError, match=message):
        read_data(root)


def test_yolo_needs_names(shape_source, tmp_path):
    writers.write_yolo(shape_source, tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnc: 5\n")
    with pytest.raises(UnusableDataError, match="names"):
        read_data(tmp_path)


def test_arguments_are_checked(shapes, tmp_path):
    with pytest.raises(ValueError, match="task must be one of"):
        read_data(shapes, task="pose")
    with pytest.raises(FileNotFoundError, match="data: no such file or folder"):
        read_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="val_share"):
        split_data(read_data(shapes), val_share=1.0)


# Details of formats


def test_labelme_shapes(tmp_path):
    image = tmp_path / "a.png"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(image)
    bitmap = np.zeros((10, 20), bool)
    bitmap[2:8, 3:9] = True
    shapes = [
        {"label": "box", "shape_type": "rectangle", "points": [[30, 20], [10, 5]]},
        {"label": "disc", "shape_type": "circle", "points": [[20, 20], [20, 30]]},
        {"label": "part", "shape_type": "polygon", "group_id": 1,
         "points": [[0, 0], [4, 0], [4, 4]]},
        {"label": "part", "shape_type": "polygon", "group_id": 1,
         "points": [[10, 10], [14, 10], [14, 14]]},
        {"label": "brush", "shape_type": "mask", "points": [[5, 6], [24, 15]],
         "mask": writers.png_text(bitmap)},
        {"label": "__ignore__", "shape_type": "rectangle", "points": [[0, 0], [9, 9]]},
    ]  # fmt: skip
    content = {
        "shapes": shapes,
        "imagePath": "..\\photos\\a.png",
        "imageHeight": 40,
        "imageWidth": 60,
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = read_data(tmp_path)
    found = {a["category_id"]: a for a in data.splits["all"].content["annotations"]}
    by_name = {name: found[i] for i, name in enumerate(data.classes, start=1)}
    assert list(by_name) == ["box", "brush", "disc", "part"]
    assert by_name["box"]["bbox"] == [10, 5, 20, 15]
    assert by_name["brush"]["bbox"] == [8, 8, 6, 6]
    assert by_name["disc"]["bbox"] == pytest.approx([10, 10, 20, 20])
    assert len(by_name["part"]["segmentation"]) == 2
    assert data.findings == []


def test_voc_difficult_objects_and_zero_based_boxes(shape_source, tmp_path):
    writers.write_voc(shape_source, tmp_path)
    file = sorted((tmp_path / "Annotations").iterdir())[0]
    text = file.read_text()
    box = "<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
    one = f"<object><name>star</name><difficult>1</difficult>{box}</object>"
    file.write_text(text.replace("</annotation>", f"{one}</annotation>"))
    data = read_data(tmp_path)
    crowds = [a for part in data.splits.values() for a in part.content["annotations"]
              if a["iscrowd"]]  # fmt: skip
    assert [a["bbox"] for a in crowds] == [[0, 0, 5, 5]]
    assert any("begin at 0" in note for note in data.notes)


def test_xml_with_entities_is_refused(shape_source, tmp_path):
    writers.write_voc(shape_source, tmp_path)
    file = sorted((tmp_path / "Annotations").iterdir())[0]
    file.write_text(f'<!DOCTYPE a [<!ENTITY b "c">]>{file.read_text()}')
    (finding,) = (f for f in read_data(tmp_path).findings if f.kind == "unreadable label file")
    assert "DOCTYPE" in finding.message


def test_roboflow_paths_of_yolo(shape_source, tmp_path):
    writers.write_yolo(shape_source, tmp_path)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            target = tmp_path / split / kind
            target.parent.mkdir(exist_ok=True)
            (tmp_path / kind / split).rename(target)
    names = ", ".join(shape_source.classes)
    (tmp_path / "data.yaml").write_text(
        f"train: ../train/images\nval: ../val/images\nnames: [{names}]\n"
    )
    assert instance_records(read_data(tmp_path), tmp_path, masks=True) == expected(
        shape_source, masks=True
    )
