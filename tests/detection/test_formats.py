"""For each way in which tools write COCO files, a detector that returns the truth scores 100.

No model runs: the evaluator of the tool gets what a perfect detector would find, and what another
one would.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as codec

from spatial_mamba_d2.detection.data import (
    build_train_loader,
    load_dataset,
    load_training_datasets,
)
from spatial_mamba_d2.detection.trainer import build_evaluator

HEIGHT, WIDTH = 80, 96
COLOR = (13, 200, 77)  # of the images
# image, class, x, y, width, height
OBJECTS = [
    ("a.png", "cat", 10, 12, 30, 24),
    ("a.png", "dog", 50, 30, 34, 36),
    ("b.png", "dog", 8, 8, 28, 40),
    ("b.png", "cat", 48, 20, 36, 28),
    ("sub/c.png", "cat", 20, 30, 40, 40),
]
IMAGES = sorted({name for name, *_ in OBJECTS})


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def bitmap(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def run_lengths(x, y, w, h):
    counts, value = [0], 0
    for pixel in bitmap(x, y, w, h).ravel(order="F"):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def compressed(*box):
    rle = codec.frPyObjects(run_lengths(*box), HEIGHT, WIDTH)
    return {**rle, "counts": rle["counts"].decode()}


def coco_content(classes=("cat", "dog")):
    return {
        "images": [
            {"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for i, name in enumerate(IMAGES, start=1)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": IMAGES.index(name) + 1,
                "category_id": classes.index(class_) + 1,
                "bbox": [float(side) for side in box],
                "segmentation": polygon(*box),
                "area": float(box[2] * box[3]),
                "iscrowd": 0,
            }
            for number, (name, class_, *box) in enumerate(OBJECTS, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        "info": {},
    }


@pytest.fixture
def write(tmp_path):
    """``write(file name, content, encoding)``: a file in a folder with the images."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in IMAGES:
        Image.new("RGB", (WIDTH, HEIGHT), COLOR).save(images / name)

    def write(name, content, encoding="utf-8"):
        (tmp_path / name).write_text(json.dumps(content), encoding=encoding)
        return tmp_path / name

    return write


@pytest.fixture
def keys(make_cfg, tmp_path):
    """``keys(train, val, KEY, VALUE, ...)``: the configuration for two files."""

    def keys(train, val, *more):
        pairs = {"TRAIN_JSON": train, "TEST_JSON": val}
        pairs |= {f"{split}_IMAGES": tmp_path / "images" for split in ("TRAIN", "TEST")}
        words = [word for key, value in pairs.items() for word in (f"DATASETS.{key}", value)]
        return make_cfg(*words, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATALOADER.NUM_WORKERS", 0,
                        *more)  # fmt: skip

    return keys


def found(record, classes, wrong):
    """What a detector finds in an image: the truth, or the truth changed by ``wrong``."""
    objects = [o for o in OBJECTS if record["file_name"].endswith(f"images/{o[0]}")]
    instances = Instances((HEIGHT, WIDTH))
    objects = [wrong(list(o)) for o in objects]
    boxes = np.array([o[2:] for o in objects], float)
    boxes[:, 2:] += boxes[:, :2]
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.scores = torch.full((len(objects),), 0.9)
    instances.pred_classes = torch.tensor([classes.index(o[1]) for o in objects])
    instances.pred_masks = torch.tensor(np.stack([bitmap(*o[2:]) for o in objects]))
    return {"instances": instances}


def scores(cfg, *detectors, classes=None):
    """What the evaluation says about detectors, with the classes of the training data.

    Args:
        detectors: functions of an object; the truth if there is none.
    """
    classes = classes or load_training_datasets(cfg)[0].classes
    dataset = load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False, classes=classes)
    evaluator = build_evaluator(cfg, dataset)
    results = []
    for detector in detectors or (lambda o: o,):
        evaluator.reset()
        for record in dataset.records:
            evaluator.process([record], [found(record, classes, detector)])
        results.append(evaluator.evaluate())
    return results if detectors else results[0]


def moved(o):
    return [*o[:2], o[2] + 5, *o[3:]]


def swapped(o):
    return [o[0], {"cat": "dog", "dog": "cat"}[o[1]], *o[2:]]


def check(cfg, wrong=moved):
    """The truth scores 100 in each class, and ``wrong``, another detector, does not."""
    perfect, other = scores(cfg, lambda o: o, wrong)
    tasks = {"bbox", "segm"} if cfg.MODEL.MASK_ON else {"bbox"}
    assert set(perfect) == tasks
    for task in tasks:
        for metric in ("AP", "AP50", "AP75", "AP-cat", "AP-dog"):
            assert perfect[task][metric] == pytest.approx(100), (task, metric)
            assert other[task]["AP"] < 90


def each(change):
    """Applies ``change`` to every annotation, in the file of training and in that of the test."""

    def apply(content):
        for number, annotation in enumerate(content["annotations"]):
            change(annotation, number)

    return apply


def segmentation(write_one):
    return each(lambda a, n: a.update(segmentation=write_one(*map(int, a["bbox"]))))


def restart_ids(content):
    for annotation in content["annotations"]:
        before = [a for a in content["annotations"] if a["image_id"] == annotation["image_id"]]
        annotation["id"] = next(i for i, a in enumerate(before, 1) if a is annotation)


def string_ids_of_images(content):
    for image in content["images"]:
        image["id"] = f"img_{image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"img_{annotation['image_id']}"


def mixed_ids_of_images(content):
    string_ids_of_images(content)
    content["images"][1]["id"] = 7
    for annotation in content["annotations"]:
        if annotation["image_id"] == "img_2":
            annotation["image_id"] = "7"


def padded_ids_of_images(content):
    """As pandas does to one column, but not to the other."""
    for image in content["images"]:
        image["id"] = f"{image['id']:06}"


def float_ids(content):
    for image in content["images"]:
        image["id"] = float(image["id"])
    for annotation in content["annotations"]:
        annotation["category_id"] = float(annotation["category_id"])


def string_numbers(content):
    for image in content["images"]:
        image.update(id=str(image["id"]), width=str(WIDTH), height=f"{HEIGHT}.0")
    for category in content["categories"]:
        category["id"] = str(category["id"])
    for a in content["annotations"]:
        a.update(id=str(a["id"]), category_id=str(a["category_id"]), iscrowd="0",
                 bbox=[*map(str, a["bbox"])], area=str(a["area"]))  # fmt: skip


def unused_root(content):
    """Category 0 is the name of the project."""
    content["categories"].insert(0, {"id": 0, "name": "pets-x1y2", "supercategory": "none"})


def no_sizes(content):
    for image in content["images"]:
        del image["height"], image["width"]


def rle_and_polygons(content):
    for annotation in content["annotations"][::2]:
        annotation["segmentation"] = run_lengths(*map(int, annotation["bbox"]))


def exact_repetitions(content):
    content["annotations"] += copy.deepcopy(content["annotations"])


def one_more(**change):
    """Another annotation, which is no object."""

    def apply(content):
        content["annotations"].append({**content["annotations"][0], "id": 99, **change})

    return apply


SAME_CONTENT = {
    "as COCO": lambda content: None,
    "ids from 0": each(lambda a, n: a.update(id=n)),
    "ids restart": restart_ids,
    "ids missing": each(lambda a, n: a.pop("id")),
    "ids null": each(lambda a, n: a.update(id=None)),
    "ids negative": each(lambda a, n: a.update(id=-n)),
    "ids are strings": each(lambda a, n: a.update(id=f"ann{n}")),
    "string ids of images": string_ids_of_images,
    "mixed ids of images": mixed_ids_of_images,
    "padded ids of images": padded_ids_of_images,
    "float ids": float_ids,
    "numbers are strings": string_numbers,
    "no area": each(lambda a, n: a.pop("area")),
    "area 0": each(lambda a, n: a.update(area=0)),
    "some areas null": each(lambda a, n: a.update(area=None) if n % 2 else None),
    "no iscrowd": each(lambda a, n: a.pop("iscrowd")),
    "iscrowd false": each(lambda a, n: a.update(iscrowd=False)),
    "iscrowd null": each(lambda a, n: a.update(iscrowd=None)),
    "iscrowd float": each(lambda a, n: a.update(iscrowd=0.0)),
    "RLE list": segmentation(run_lengths),
    "RLE string": segmentation(compressed),
    "RLE of bytes": segmentation(
        lambda *box: {**compressed(*box), "counts": str(compressed(*box)["counts"].encode())}
    ),
    "RLE in a list": segmentation(lambda *box: [run_lengths(*box)]),
    "RLE of floats": segmentation(
        lambda *box: {
            "size": [float(HEIGHT), float(WIDTH)],
            "counts": [*map(float, run_lengths(*box)["counts"])],
        }
    ),
    "RLE and polygons": rle_and_polygons,
    "flat polygon": segmentation(lambda *box: polygon(*box)[0]),
    "polygon of points": segmentation(
        lambda *box: np.reshape(polygon(*box)[0], (-1, 2)).tolist()
    ),
    "polygons of points": segmentation(
        lambda *box: [np.reshape(polygon(*box)[0], (-1, 2)).tolist()]
    ),
    "stray part of 2 points": segmentation(lambda *box: [*polygon(*box), [40, 40, 41, 41]]),
    "stray part first": segmentation(lambda *box: [[40, 40, 41, 41], *polygon(*box)]),
    "stray part of 7 numbers": segmentation(lambda *box: [*polygon(*box), [4, 4, 5, 5, 6, 6, 7]]),
    "empty part": segmentation(lambda *box: [*polygon(*box), []]),
    "part without area": segmentation(lambda *box: [*polygon(*box), [2, 2, 3, 3, 2, 2]]),
    "no boxes": each(lambda a, n: a.pop("bbox")),
    "empty boxes": each(lambda a, n: a.update(bbox=[0, 0, 0, 0] if n % 2 else [])),
    "no sizes": no_sizes,
    "exact repetitions": exact_repetitions,
    "a box without width": one_more(bbox=[3, 3, 0, 5], area=0, segmentation=[[3, 3, 3, 8, 3, 3]]),
    "a box without sides": one_more(bbox=[3, 3, 0, 0], area=0, segmentation=[]),
    "no info": lambda content: content.pop("info"),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME_CONTENT.values(), ids=SAME_CONTENT)
def test_the_truth_scores_100(change, write, keys):
    content = coco_content()
    change(content)
    file = write("instances.json", content)
    check(keys(file, file))


ABOUT_MASKS = [name for name in SAME_CONTENT if "RLE" in name or "part" in name or "poly" in name]


@pytest.mark.parametrize("name", [*ABOUT_MASKS, "no boxes", "float ids", "numbers are strings"])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_training_sees_the_truth(name, mask_format, write, keys):
    """Boxes, classes and masks of the loader, without resize."""
    content = coco_content()
    SAME_CONTENT[name](content)
    file = write("instances.json", content)
    cfg = keys(file, file, "INPUT.MIN_SIZE_TRAIN", (HEIGHT,), "INPUT.RANDOM_FLIP", "none",
               "SOLVER.IMS_PER_BATCH", 1, "INPUT.MASK_FORMAT", mask_format,
               "DATALOADER.ASPECT_RATIO_GROUPING", False)  # fmt: skip
    datasets = load_training_datasets(cfg)
    loader = iter(build_train_loader(cfg, datasets))
    seen = {}
    for _ in IMAGES:
        (record,) = next(loader)
        instances = record["instances"]
        masks = instances.gt_masks
        if not isinstance(masks.__dict__.get("tensor"), torch.Tensor):
            masks = [
                codec.decode(codec.merge(codec.frPyObjects([*map(list, p)], HEIGHT, WIDTH)))
                for p in masks.polygons
            ]
        else:
            masks = list(masks.tensor.numpy())
        for box, class_, mask in zip(
            instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist(), masks, strict=True
        ):
            x, y, x2, y2 = map(round, box)
            name = next(n for n in IMAGES if record["file_name"].endswith(f"images/{n}"))
            seen[name, datasets[0].classes[class_], x, y, x2 - x, y2 - y] = mask
    assert sorted(seen) == sorted(OBJECTS)
    for (_, _, *box), mask in seen.items():
        assert (mask.astype(bool) == bitmap(*box)).mean() > 0.999


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(encoding, write, keys):
    file = write("instances.json", coco_content(), encoding)
    check(keys(file, file))


@pytest.mark.parametrize("name", ["as COCO", "RLE list", "RLE string", "string ids of images"])
@pytest.mark.parametrize("mask_on", [True, False])
def test_the_truth_is_drawn(name, mask_on, write, keys, tmp_path):
    np.random.seed(0)  # Detectron2 draws in random colors, of which some are near the image's
    content = coco_content()
    SAME_CONTENT[name](content)
    if not mask_on:
        del content["annotations"][0]["segmentation"]
    file = write("instances.json", content)
    scores(keys(file, file, "TEST.PICTURES", 1, "MODEL.MASK_ON", mask_on))
    (drawing,) = (tmp_path / "output/pictures").rglob("*.png")
    pixels = np.array(Image.open(drawing)).astype(int)
    truth, prediction = np.split(pixels, 2, axis=1)
    scale = truth.shape[0] / HEIGHT
    for half in (truth, prediction):
        x, y = round(10 * scale), round(18 * scale)  # left edge of the first object
        assert np.abs(half[y, x - 6 : x + 6] - COLOR).max() > 40
        assert np.abs(half[y, : x - 6] - COLOR).max() < 10


EMPTY = {"absent": None, "null": None, "list": [], "list of lists": [[]], "object": {}, "text": ""}


@pytest.mark.parametrize("what", [*EMPTY, "NaN"])
def test_boxes_only(what, write, keys, tmp_path):
    content = coco_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = EMPTY.get(what, float("nan"))
        if what == "absent":
            del annotation["segmentation"]
    files = [write(name, content) for name in ("train.json", "val.json")]
    with pytest.raises(ValueError, match=r"train\.json: 5 of 5 annotations have no segmentation.*"
                       r"MODEL\.MASK_ON False"):  # fmt: skip
        load_training_datasets(keys(*files))
    cfg = keys(*files, "MODEL.MASK_ON", False)
    check(cfg)
    (record,) = next(iter(build_train_loader(cfg, load_training_datasets(cfg))))[:1]
    assert not record["instances"].has("gt_masks")


def test_a_mask_that_is_missing_in_the_test_set(write, keys, caplog):
    content = coco_content()
    train = write("train.json", content)
    del content["annotations"][1]["segmentation"]
    val = write("val.json", content)
    with pytest.raises(ValueError, match=r"val\.json: 1 of 5 annotations have no segmentation, the "
                       "first: annotation 2 of image 1: .* DATASETS.ON_ERROR skip"):  # fmt: skip
        scores(keys(train, val))
    cfg = keys(train, val, "DATASETS.ON_ERROR", "skip")
    dataset = load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False)
    assert sum(len(r["annotations"]) for r in dataset.records) == 4
    assert "1 of 5 annotations have no segmentation" in caplog.text


# --- classes ---------------------------------------------------------------------------------


def test_classes_in_another_order(write, keys):
    files = write("train.json", coco_content()), write("val.json", coco_content(("dog", "cat")))
    check(keys(*files), swapped)
    for classes, other in (("cat", "dog"), "dog"), (("dog", "cat"), "cat"):
        perfect = scores(keys(*files), classes=list(classes))
        assert perfect["bbox"]["AP"] == pytest.approx(100), other


def test_a_class_that_only_one_file_has(write, keys):
    """An unused root in the test set; a class without an object in it."""
    train, val = coco_content(), coco_content()
    unused_root(val)
    check(keys(write("train.json", train), write("val.json", val)))
    val = coco_content()
    val["categories"].pop()
    val["annotations"] = [a for a in val["annotations"] if a["category_id"] == 1]
    cfg = keys(write("train.json", train), write("val.json", val))
    perfect = scores(cfg)
    assert perfect["bbox"]["AP-cat"] == pytest.approx(100) and np.isnan(perfect["bbox"]["AP-dog"])
    (wrong,) = scores(cfg, lambda o: [o[0], "dog", *o[2:]])
    assert wrong["bbox"]["AP-cat"] == 0


def test_other_class_names_are_refused_with_both_lists(write, keys):
    cfg = keys(
        write("train.json", coco_content()),
        write("val.json", {**coco_content(), "categories": [{"id": 1, "name": "Cat"},
                                                            {"id": 2, "name": "dog"}]}),
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        scores(cfg)
    assert "val.json: classes are matched by name, and the detector has no 'Cat'" in str(
        caught.value
    )
    assert "in the file: 'Cat', 'dog'" in str(caught.value)
    assert "the detector's: 'cat', 'dog'" in str(caught.value)


def test_several_files_for_one_training(write, keys, make_cfg, tmp_path):
    """Each has its own order and folder; together they have all objects under the right class."""
    first, second = coco_content(), coco_content(("dog", "cat"))
    first["annotations"] = [a for a in first["annotations"] if a["image_id"] == 1]
    second["annotations"] = [a for a in second["annotations"] if a["image_id"] > 1]
    files = write("a.json", first), write("b.json", second)
    value = str(tuple(map(str, files)))
    val = write("val.json", coco_content())
    for images in (tmp_path / "images", (str(tmp_path / "images"),) * 2):
        cfg = keys(value, val, "DATASETS.TRAIN_IMAGES", images)
        datasets = load_training_datasets(cfg)
        assert [dataset.classes for dataset in datasets] == [["cat", "dog"]] * 2
        seen = [
            (Path(r["file_name"]).name, datasets[0].classes[a["category_id"]], *map(int, a["bbox"]))
            for dataset in datasets for r in dataset.records for a in r["annotations"]
        ]  # fmt: skip
        assert sorted(seen) == sorted((Path(o[0]).name, *o[1:]) for o in OBJECTS)
    check(cfg, swapped)
    with pytest.raises(ValueError, match="TRAIN_IMAGES must be one folder for all files in"):
        keys(value, val, "DATASETS.TRAIN_IMAGES", ("a", "b", "c"))
    with pytest.raises(ValueError, match="TRAIN_JSON names a file twice"):
        keys((str(val),) * 2, val)


def test_files_with_different_classes_have_all_of_them(write, keys, caplog):
    first, second = coco_content(), coco_content(("dog", "cat", "cow"))
    second["annotations"][0]["category_id"] = 3
    value = str(tuple(str(write(*f)) for f in (("a.json", first), ("b.json", second))))
    val = write("val.json", coco_content())
    with pytest.raises(ValueError, match=r"NUM_CLASSES must be 3, .* got 2; .*'cat', 'dog', 'cow'"):
        load_training_datasets(keys(value, val))
    datasets = load_training_datasets(keys(value, val, "MODEL.ROI_HEADS.NUM_CLASSES", 3))
    assert datasets[1].classes == ["cat", "dog", "cow"]
    assert datasets[1].records[0]["annotations"][0]["category_id"] == 2
    assert "a.json of" in caplog.text and "has no category 'cow'" in caplog.text
