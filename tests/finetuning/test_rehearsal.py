"""A rehearsal passes where the training learns, and names the reason where it does not."""

from __future__ import annotations

import importlib
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.data.images import read_image
from spatial_mamba_d2.finetuning import finetune, rehearsal, running
from spatial_mamba_d2.finetuning.rehearsal import rehearse, rehearse_first
from spatial_mamba_d2.system.cli import build_training_parser
from tests.finetuning.conftest import NARROW, TASKS

pytestmark = pytest.mark.slow


def run_here(task, config_file, words, *, resume):
    """The training's tool in this process, where the variant is a narrow one."""
    run = importlib.import_module(f"spatial_mamba_d2.{task}.train").run
    args = Namespace(config_file=config_file, opts=list(words), resume=resume, eval_only=False,
                     num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")  # fmt: skip
    try:
        run(args)
    except (ValueError, FloatingPointError, OSError) as error:
        return f"error: {error}"
    return None


@pytest.fixture
def configurations(shapes, sample_images, tmp_path, monkeypatch) -> dict[str, Path]:
    """``finetune.yaml`` of each task."""
    monkeypatch.setattr(rehearsal, "_run", run_here)
    files = {}
    for task in TASKS:
        data = sample_images if task == "classification" else shapes
        files[task] = finetune(data, None, tmp_path / task, task=task, epochs=30, only_write=True)
    return files


@pytest.mark.parametrize("task", TASKS)
def test_a_healthy_training_passes(task, configurations):
    # Narrow networks need higher rates than the published ones.
    rates = {"detection": "0.001", "segmentation": "0.01", "classification": "0.1"}
    overrides = (*NARROW, "SOLVER.BASE_LR", rates[task])
    result = rehearse(configurations[task], overrides)
    assert result.task == task
    assert result.reasons == []
    assert len(result.losses) == rehearsal.ITERATIONS
    assert np.mean(result.losses[-4:]) < 0.9 * np.mean(result.losses[:4])
    assert len(result.estimates) == 3 and "passes" in result.text()
    sheet = read_image(configurations[task].parent / "rehearsal.jpg")
    assert sheet.shape[1] > 4 * 240 and len(np.unique(sheet)) > 100, "eight drawings"


FAULTS = {
    "normalised twice": ("segmentation", ("MODEL.PIXEL_MEAN", "(0.485, 0.456, 0.406)",
                         "MODEL.PIXEL_STD", "(0.229, 0.224, 0.225)"), "normalisation"),
    "no normalisation": ("detection", ("MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]",
                         "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"), "normalisation"),
    "endless warmup": ("segmentation", ("SOLVER.WARMUP_ITERS", "5000"), "WARMUP_ITERS"),
    "frozen at random": ("classification", ("MODEL.BACKBONE.FREEZE_AT", "5"), "frozen parts"),
    "frozen detector": ("detection", ("MODEL.FREEZE", "('backbone.bottom_up',)"), "frozen parts"),
    "slow average": ("detection", ("SOLVER.EMA_DECAY", "0.9999"), "moving average"),
    "tiny images": ("segmentation", ("INPUT.SHORT_PX", "16", "INPUT.CROP_PX", "16"), "image size"),
    "rate too high": ("segmentation", ("SOLVER.BASE_LR", "1e30",
                      "SOLVER.CLIP_GRADIENTS.ENABLED", "False"), "is too high"),
    "rate too low": ("segmentation", ("SOLVER.BASE_LR", "1e-12"), "is too low"),
    "no such weights": ("classification", ("MODEL.WEIGHTS", "gone.pth"), "gone.pth"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name, configurations, monkeypatch):
    task, overrides, word = FAULTS[name]
    if name not in ("rate too high", "rate too low", "no such weights"):  # known beforehand
        monkeypatch.setattr(rehearsal, "_train", lambda *args: None)
    result = rehearse(configurations[task], (*NARROW, *overrides))
    assert result.reasons and word in result.reasons[0], result.reasons


def test_labels_that_are_all_ignored(shapes, tmp_path, configurations, monkeypatch):
    monkeypatch.setattr(rehearsal, "_train", lambda *args: None)
    root = tmp_path / "ignored"
    shutil.copytree(shapes, root)
    for file in (root / "annotations" / "training").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(file)))).save(file)
    lists = configurations["segmentation"].parent / "data"
    text = (lists / "train.txt").read_text().replace(str(shapes), str(root))
    (lists / "train.txt").write_text(text)
    result = rehearse(configurations["segmentation"])
    assert "labels: less than two classes" in result.reasons[0]


def test_objects_that_are_all_crowds(shapes, tmp_path, configurations, monkeypatch):
    monkeypatch.setattr(rehearsal, "_train", lambda *args: None)
    from tests.data.checks.planted_faults import edited

    root = tmp_path / "crowds"
    root.mkdir()
    shutil.copy(shapes / "instances_train.json", root / "train.json")
    with edited(root) as content:
        for image in content["images"]:
            of_image = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            for annotation in of_image[1:]:
                annotation["iscrowd"] = 1
    overrides = ("DATASETS.TRAIN_JSON", str(root / "train.json"))
    result = rehearse(configurations["detection"], overrides)
    assert "are crowds, which do not train" in result.reasons[0]


def test_the_number_of_classes_must_fit(configurations):
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        rehearse(configurations["classification"], ("MODEL.NUM_CLASSES", "7"))
    overrides = (*NARROW, "MODEL.ROI_HEADS.NUM_CLASSES", "7")
    result = rehearse(configurations["detection"], overrides)
    assert "NUM_CLASSES" in result.reasons[0]


def test_a_training_tool_rehearses_first(configurations, monkeypatch):
    monkeypatch.setattr(rehearsal, "_train", lambda *args: None)
    parse = build_training_parser(None).parse_args
    config = ("--rehearse", "--config-file", str(configurations["segmentation"]))
    with pytest.raises(ValueError, match="rehearsal fails: normalisation"):
        rehearse_first("segmentation", parse([*config, *FAULTS["normalised twice"][1]]))
    with pytest.raises(ValueError, match="--rehearse is for a new training"):
        rehearse_first("segmentation", parse([*config, "--resume"]))


def test_finetune_trains_only_if_the_rehearsal_passes(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "_train", lambda *args: None)
    trained = []
    monkeypatch.setattr(running, "train", lambda *args: trained.append(args))
    bad = ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]", "MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]")
    with pytest.raises(ValueError, match="rehearsal fails: normalisation"):
        finetune(shapes, None, tmp_path / "bad", overrides=bad, rehearse_first=True)
    assert not trained
    finetune(shapes, None, tmp_path / "good", rehearse_first=True)
    assert trained
