"""From config keys to records: classes, skipping, and what is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from pycocotools.coco import COCO

from spatial_mamba_d2.detection.data import (
    load_dataset,
    load_training_datasets,
    register_for_evaluation,
)
from spatial_mamba_d2.detection.trainer import Trainer


@pytest.fixture
def damaged(shapes, tmp_path):
    """A copy of the test set with one truncated image, one missing, one unknown category."""
    folder = tmp_path / "damaged"
    shutil.copytree(shapes / "images/validation", folder)
    content = json.loads((shapes / "instances_val.json").read_text())
    cut, missing = (image["file_name"] for image in content["images"][:2])
    (folder / cut).write_bytes((folder / cut).read_bytes()[:600])
    (folder / missing).unlink()
    kept = {image["id"] for image in content["images"][2:]}
    wrong = next(a for a in content["annotations"] if a["image_id"] in kept)
    wrong["category_id"] = 99
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(content))
    return path, folder, content


def test_any_coco_set_through_config_alone(make_cfg, shapes):
    cfg = make_cfg()
    dataset = load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False)
    records = dataset.records
    content = json.loads((shapes / "instances_val.json").read_text())
    assert [r["image_id"] for r in records] == [image["id"] for image in content["images"]]
    ids = sorted(category["id"] for category in content["categories"])
    assert ids == [1, 2, 4, 5, 7]
    by_id = {a["id"]: a for a in content["annotations"]}
    found = [a for r in records for a in r["annotations"]]
    assert len(found) == len(by_id)
    for ours, theirs in zip(found, content["annotations"], strict=True):
        assert ids[ours["category_id"]] == theirs["category_id"]
        assert ours["bbox"] == theirs["bbox"]
    names = [category["name"] for category in content["categories"]]
    assert dataset.classes == names and dataset.category_ids == ids
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes") is None  # only read


def test_training_leaves_out_images_without_objects(make_cfg, shapes, tmp_path):
    content = json.loads((shapes / "instances_train.json").read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(content))
    cfg = make_cfg("DATASETS.TRAIN_JSON", path)
    assert len(load_dataset(cfg, cfg.DATASETS.TRAIN[0], is_train=True).records) == 1
    content["annotations"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="none of its 12 images has an object"):
        load_dataset(cfg, cfg.DATASETS.TRAIN[0], is_train=True)


def test_number_of_classes_is_checked(make_cfg):
    cfg = make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 80)
    with pytest.raises(ValueError, match=r"NUM_CLASSES must be 5, .* got 80"):
        load_dataset(cfg, cfg.DATASETS.TRAIN[0], is_train=True)


def test_damage_is_an_error(make_cfg, damaged):
    path, folder, content = damaged
    cfg = make_cfg("DATASETS.TEST_JSON", path, "DATASETS.TEST_IMAGES", folder)
    with pytest.raises(ValueError) as caught:
        load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False)
    assert str(path) in str(caught.value)
    assert content["images"][1]["file_name"] in str(caught.value)
    assert "no category has the id 99" in str(caught.value)


def test_what_is_skipped_does_not_count_as_missed(make_cfg, damaged):
    path, folder, _ = damaged
    cfg = make_cfg(
        "DATASETS.TEST_JSON", path, "DATASETS.TEST_IMAGES", folder, "DATASETS.ON_ERROR", "skip"
    )
    dataset = load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False)
    records = dataset.records
    assert len(records) == 3
    for _ in range(2):  # as after each evaluation of a training
        metadata = register_for_evaluation(cfg, dataset)
    evaluated = COCO(metadata.json_file)
    assert Path(metadata.json_file).parent == Path(cfg.OUTPUT_DIR)
    assert sorted(evaluated.getImgIds()) == sorted(r["image_id"] for r in records)
    assert len(evaluated.getAnnIds()) == sum(len(r["annotations"]) for r in records)
    assert metadata.thing_classes == dataset.classes


def test_one_process_per_machine_writes_what_is_left(make_cfg, damaged, monkeypatch):
    path, folder, _ = damaged
    cfg = make_cfg(
        "DATASETS.TEST_JSON", path, "DATASETS.TEST_IMAGES", folder, "DATASETS.ON_ERROR", "skip"
    )
    dataset = load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 1)
    monkeypatch.setattr(comm, "synchronize", lambda: None)
    metadata = register_for_evaluation(cfg, dataset)
    assert not Path(metadata.json_file).exists()


def test_a_clean_test_set_is_evaluated_as_it_is(make_cfg, shapes):
    cfg = make_cfg()
    dataset = load_dataset(cfg, cfg.DATASETS.TEST[0], is_train=False)
    metadata = register_for_evaluation(cfg, dataset)
    assert metadata.json_file == str(shapes / "instances_val.json")


def test_masks_are_needed_for_a_mask_head(make_cfg, shapes, tmp_path):
    content = json.loads((shapes / "instances_train.json").read_text())
    without = next(a for a in content["annotations"] if not a["iscrowd"])
    del without["segmentation"]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    cfg = make_cfg("DATASETS.TRAIN_JSON", path)
    with pytest.raises(ValueError, match=rf"annotation {without['id']} .*MODEL.MASK_ON False"):
        load_dataset(cfg, cfg.DATASETS.TRAIN[0], is_train=True)
    boxes_only = make_cfg("DATASETS.TRAIN_JSON", path, "MODEL.MASK_ON", False)
    assert load_dataset(boxes_only, boxes_only.DATASETS.TRAIN[0], is_train=True).records


# --- before the first iteration --------------------------------------------------------------


def test_the_test_set_is_checked_before_training(make_cfg, damaged):
    path, folder, _ = damaged
    cfg = make_cfg("DATASETS.TEST_JSON", path, "DATASETS.TEST_IMAGES", folder)
    with pytest.raises(ValueError, match="damaged.json: problems found: 3"):
        Trainer(cfg)


def test_a_test_set_that_is_not_there_is_named_with_the_way_out(make_cfg, monkeypatch, tmp_path):
    coco = MetadataCatalog.get("coco_2017_val").__dict__
    monkeypatch.setitem(coco, "json_file", f"{tmp_path}/none.json")
    monkeypatch.setitem(coco, "image_root", str(tmp_path))
    words = ("DATASETS.TEST_JSON", "", "DATASETS.TEST_IMAGES", "")
    with pytest.raises(
        FileNotFoundError,
        match=r"no file .*none\.json \(of DATASETS\.TEST "
        r"'coco_2017_val'; DATASETS\.TEST_JSON .*DATASETS\.TEST \(\) trains",
    ):
        Trainer(make_cfg(*words))  # fmt: skip
    with pytest.raises(ValueError, match="no data set is registered as 'nowhere'"):
        Trainer(make_cfg(*words, "DATASETS.TEST", "('nowhere',)"))
    assert Trainer(make_cfg(*words, "DATASETS.TEST", "()")).classes


def test_all_objects_are_crowds(make_cfg, shapes, tmp_path):
    content = json.loads((shapes / "instances_train.json").read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    path = tmp_path / "crowds.json"
    path.write_text(json.dumps(content))
    number = len(content["annotations"])
    message = f"none of its 12 images has an object: all {number} annotations are crowds"
    with pytest.raises(ValueError, match=message):
        load_training_datasets(make_cfg("DATASETS.TRAIN_JSON", path))


def test_other_classes_of_the_weights_are_said(make_cfg, tmp_path, caplog):
    cfg = make_cfg("MODEL.WEIGHTS", tmp_path / "other.pth")
    trainer = Trainer(cfg)
    classes = list(trainer.classes)
    others = ["other", *classes[1:]]
    for names, words in (
        (classes, ""),
        (classes[::-1], "another order"),
        (others, "differ: class 0"),
    ):
        torch.save({"model": trainer.network.state_dict(), "classes": names}, cfg.MODEL.WEIGHTS)
        caplog.clear()
        trainer.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        assert ("class 0 is" in caplog.text) == bool(words)
        assert words in caplog.text
    caplog.clear()
    trainer.checkpointer.skip = ("roi_heads.box_predictor.cls_score.",)
    trainer.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    assert "class 0 is" not in caplog.text
