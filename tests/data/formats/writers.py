"""Writers of every format, from one source, so that a reader's result can be compared with it."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatial_mamba_d2.data.coco_masks import mask_box
from spatial_mamba_d2.data.json_file import read_json

Objects = list[tuple[str, list[float], list[float]]]  # class, box (x, y, w, h), polygon


@dataclass
class Source:
    """Images with objects that all formats can hold: one polygon each, and no crowds."""

    classes: list[str]
    images: dict[str, list[tuple[Path, tuple[int, int], Objects]]]  # by split

    @property
    def names(self) -> list[str]:
        return self.classes


def read_source(
    files: dict[str, Path], image_folders: dict[str, Path], num_images: int = 1000
) -> Source:
    """From COCO files, of which every further polygon and every crowd is left out."""
    images: dict[str, Any] = {}
    used = set()
    for split, file in files.items():
        content = read_json(file)
        names = {c["id"]: c["name"] for c in content["categories"]}
        images[split] = []
        for image in content["images"][:num_images]:
            objects: Objects = []
            for a in content["annotations"]:
                if (
                    a["image_id"] == image["id"]
                    and not a["iscrowd"]
                    and len(a["segmentation"]) == 1
                ):
                    polygon = a["segmentation"][0]
                    x1, y1, x2, y2 = mask_box([polygon])
                    box = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
                    if min(box[2:]) >= 1:
                        objects.append((names[a["category_id"]], box, polygon))
                        used.add(names[a["category_id"]])
            path = image_folders[split] / image["file_name"]
            images[split].append((path, (image["height"], image["width"]), objects))
    return Source(sorted(used), images)


def write_coco(source: Source, root: Path, *, masks: bool = True, one_file: bool = False) -> Path:
    """``train.json``, ``val.json`` and ``images/``; or ``all.json`` alone."""
    ids = {name: 3 * index + 1 for index, name in enumerate(source.classes)}
    parts = (
        {"all": [i for images in source.images.values() for i in images]}
        if one_file
        else source.images
    )
    number = 0
    for split, images in parts.items():
        content: dict[str, Any] = {
            "info": {},
            "images": [],
            "annotations": [],
            "categories": [{"id": id_, "name": name} for name, id_ in ids.items()],
        }
        for image_id, (path, (height, width), objects) in enumerate(images, start=1):
            place(path, root / "images" / path.name)
            content["images"].append(
                {"id": image_id, "file_name": path.name, "height": height, "width": width}
            )
            for name, box, polygon in objects:
                number += 1
                annotation = {"id": number, "image_id": image_id, "category_id": ids[name],
                              "bbox": box, "iscrowd": 0, "area": box[2] * box[3]}  # fmt: skip
                if masks:
                    annotation |= {"segmentation": [polygon], "area": area_of(polygon)}
                content["annotations"].append(annotation)
        (root / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def write_yolo(source: Source, root: Path, *, masks: bool = True) -> Path:
    for split, images in source.images.items():
        for path, (height, width), objects in images:
            place(path, root / "images" / split / path.name)
            lines = []
            for name, (x, y, w, h), polygon in objects:
                numbers = polygon if masks else [x + w / 2, y + h / 2, w, h]
                words = [f"{v / (height if i % 2 else width):.6f}" for i, v in enumerate(numbers)]
                lines.append(" ".join([str(source.classes.index(name)), *words]))
            label = root / "labels" / split / f"{path.stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("\n".join(lines) + "\n" if lines else "", encoding="utf-8")
    names = "".join(f"  {i}: {json.dumps(name)}\n" for i, name in enumerate(source.classes))
    text = (
        f"path: .\ntrain: images/train\nval: images/val\nnc: {len(source.classes)}\nnames:\n{names}"
    )
    (root / "data.yaml").write_text(text, encoding="utf-8")
    return root


def write_labelme(source: Source, root: Path, *, masks: bool = True) -> Path:
    for split, images in source.images.items():
        for path, (height, width), objects in images:
            file = root / split / path.name
            place(path, file)
            shapes = []
            for name, (x, y, w, h), polygon in objects:
                points = [polygon[i : i + 2] for i in range(0, len(polygon), 2)]
                kind = "polygon"
                if not masks:
                    points, kind = [[x, y], [x + w, y + h]], "rectangle"
                shapes.append({"label": name, "points": points, "group_id": None,
                               "shape_type": kind, "flags": {}})  # fmt: skip
            content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": path.name,
                       "imageData": None, "imageHeight": height, "imageWidth": width}  # fmt: skip
            file.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")
    return root


def write_voc(source: Source, root: Path, *, masks: bool = False) -> Path:
    for split, images in source.images.items():
        listed = []
        for path, (height, width), objects in images:
            place(path, root / "JPEGImages" / path.name)
            parts = [
                f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
                f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for name, (x, y, w, h), _ in objects
            ]
            file = root / "Annotations" / f"{path.stem}.xml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                f"<annotation><filename>{path.name}</filename><size><width>{width}</width>"
                f"<height>{height}</height><depth>3</depth></size>{''.join(parts)}</annotation>",
                encoding="utf-8",
            )
            listed.append(path.stem)
        sets = root / "ImageSets" / "Main" / f"{split}.txt"
        sets.parent.mkdir(parents=True, exist_ok=True)
        sets.write_text("\n".join(listed) + "\n", encoding="utf-8")
    return root


def write_huggingface(source: Source, root: Path, *, masks: bool = False) -> Path:
    import datasets

    parts = {}
    for split, images in source.images.items():
        rows = [
            {
                "image": {"path": path.name, "bytes": path.read_bytes()},
                "width": width,
                "height": height,
                "objects": {
                    "bbox": [box for _, box, _ in objects],
                    "category": [source.classes.index(name) for name, _, _ in objects],
                },
            }
            for path, (height, width), objects in images
        ]
        features = datasets.Features(
            image=datasets.Image(),
            width=datasets.Value("int64"),
            height=datasets.Value("int64"),
            objects={
                "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
                "category": datasets.Sequence(datasets.ClassLabel(names=source.classes)),
            },
        )
        parts[split] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


INSTANCE_WRITERS: dict[str, tuple[Callable[..., Path], bool]] = {
    "coco": (write_coco, True),
    "yolo": (write_yolo, True),
    "labelme": (write_labelme, True),
    "voc": (write_voc, False),
    "huggingface": (write_huggingface, False),
}

# (image, label indices, split) -> files
Maps = dict[str, list[tuple[Path, np.ndarray]]]


def write_maps(
    maps: Maps, root: Path, image: str, label: str, save: Callable[[np.ndarray], Image.Image]
) -> Path:
    """Images and labels under templates such as ``images/{split}/{name}{suffix}``."""
    for split, pairs in maps.items():
        for path, indices in pairs:
            words = {"split": split, "name": path.stem, "suffix": path.suffix}
            place(path, root / image.format(**words))
            file = root / label.format(**words)
            file.parent.mkdir(parents=True, exist_ok=True)
            save(indices).save(file)
    return root


def write_classes(images: dict[str, list[tuple[Path, str]]], root: Path) -> Path:
    for split, samples in images.items():
        for path, name in samples:
            place(path, root / split / name / path.name)
    return root


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def area_of(polygon: Sequence[float]) -> float:
    x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def png_text(bitmap: np.ndarray) -> str:
    """A mask as labelme stores it: PNG in base 64."""
    file = io.BytesIO()
    Image.fromarray(bitmap.astype(np.uint8) * 255).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
