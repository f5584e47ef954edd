"""From a folder of labelled images to a training and its report."""

from __future__ import annotations

import importlib
import re
import shutil

import pytest
import torch
import yaml

from spatial_mamba_d2.data.json_file import read_json
from spatial_mamba_d2.finetuning import finetune, probing, running
from spatial_mamba_d2.finetuning.data_facts import DataFacts
from spatial_mamba_d2.finetuning.probing import OutOfMemoryError, Probe
from spatial_mamba_d2.finetuning.settings import Situation, choose
from spatial_mamba_d2.reporting import report
from tests.data.formats import writers
from tests.finetuning.conftest import SMALL, TASKS

pytestmark = pytest.mark.slow

FACTS = DataFacts(1000, 200, 5, 480, 640, 40.0, 0.4)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_writes_its_configuration_and_trains(task, runs):
    run = runs[task]
    text = (run / "finetune.yaml").read_text()
    assert text.splitlines()[0] == (
        f"# python tools/{probing.TOOLS[task]} --config-file {run / 'finetune.yaml'}"
    )
    record = read_json(run / "data" / "data.json")
    assert record["task"] == task and record["split"] == "as in the data"
    assert not [f for f in run.rglob("*.jpg") if "pictures" not in f.parts], "copies of images"
    best = {"detection": "model_best.pth"}.get(task, "best.ckpt")
    assert (run / best).is_file() and list(run.glob("scores*.json"))


@pytest.mark.parametrize("task", TASKS)
def test_the_report_has_the_scores_of_the_run(task, runs, tmp_path):
    page, numbers = tmp_path / "report.html", tmp_path / "report.json"
    content = report([runs[task]], html=page, json_file=numbers)
    assert read_json(numbers) == content
    recorded = read_json(next(runs[task].glob("scores*.json")))
    scores = {
        f"{what}/{name}": value
        for what, e in content["runs"][0]["evaluations"].items()
        for name, value in e["scores"].items()
    }
    pairs = {
        "detection": {"boxes/AP": "bbox/AP", "masks/AP": "segm/AP"},
        "segmentation": {"label maps/mIoU": "mIoU", "label maps/aAcc": "aAcc"},
        "classification": {"classes/top1": "top1"},
    }[task]
    for ours, theirs in pairs.items():
        value = next(v for k, v in _flat(recorded) if k.endswith(theirs))
        assert 100 * scores[ours] == pytest.approx(value, abs=1e-3)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)""", text), "loads something"
    assert "Protocol" in text and content["runs"][0]["data_fingerprint"] in text


def _flat(content: dict, prefix: str = ""):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def test_runs_are_compared(runs, sample_images, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs["classification"], other)
    content = report([runs["classification"], other], html=tmp_path / "report.html")
    (result,) = content["comparisons"]
    assert result["difference"] == 0 and not result["is_clear"]
    assert content["runs"][0]["data_fingerprint"] == content["runs"][1]["data_fingerprint"]
    on_folder = report([other], data=sample_images)
    evaluations = [c["runs"][0]["evaluations"]["classes"]["scores"] for c in (content, on_folder)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("name", ["yolo", "voc"])
def test_other_formats_train_and_are_reported(name, shape_source, tmp_path):
    """One command from the folder to the run, one more to the report."""
    data = tmp_path / name
    data.mkdir()
    writers.INSTANCE_WRITERS[name][0](shape_source, data)
    finetune(data, None, tmp_path / "run", epochs=1, overrides=SMALL["detection"])
    content = report([tmp_path / "run"])
    evaluations = content["runs"][0]["evaluations"]
    assert set(evaluations) == ({"boxes"} if name == "voc" else {"boxes", "masks"})
    assert content["runs"][0]["num_images"] == 5


def test_data_without_a_split_are_split_and_resumed(shape_source, tmp_path):
    writers.write_coco(shape_source, tmp_path / "data", one_file=True)
    run = tmp_path / "run"
    small = SMALL["detection"]
    finetune(tmp_path / "data", None, run, epochs=1, overrides=small)
    record = read_json(run / "data" / "data.json")
    assert "seed 0" in record["split"]
    assert record["num_images"] == {"train": 14, "val": 3}
    with pytest.raises(ValueError, match="holds a training"):
        finetune(tmp_path / "data", None, run)
    # What was said at first still counts.
    finetune(None, None, run, resume=True, overrides=("SOLVER.MAX_ITER", "6"))
    assert torch.load(run / "model_final.pth", weights_only=False)["iteration"] == 5
    load = importlib.import_module("spatial_mamba_d2.detection.config").load_config
    written = load(run / "finetune.yaml", [])
    assert written == load(run / "finetune.yaml", small)
    assert "# from the command line" in (run / "finetune.yaml").read_text(encoding="utf-8")


def test_wrong_overrides_leave_the_folder_usable(shape_source, tmp_path):
    writers.write_coco(shape_source, tmp_path / "data", one_file=True)
    for overrides, message in (
        (("SOLVER.MAX_ITERS", "6"), "command line: unknown config key SOLVER.MAX_ITERS"),
        (("SOLVER.MAX_ITER",), "overrides must come as KEY VALUE pairs, got 1 words"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(tmp_path / "data", None, tmp_path / "run", epochs=1, overrides=overrides)
        assert not (tmp_path / "run" / "finetune.yaml").exists()


def test_a_model_with_other_classes_goes_on(runs, sample_images, tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(sample_images / split, data / split)
        shutil.rmtree(data / split / "star")
    weights = runs["classification"] / "best.ckpt"
    # The narrow variant has no letter of its own.
    finetune(data, weights, tmp_path / "run", size="t", epochs=2, overrides=SMALL["classification"])
    written = yaml.safe_load((tmp_path / "run" / "finetune.yaml").read_text())
    assert written["MODEL"]["WEIGHTS_SKIP"] == "('head.',)"
    assert written["MODEL"]["NUM_CLASSES"] == 4


def test_minutes_are_turned_into_iterations(shapes, tmp_path, monkeypatch):
    tried = []

    def measured(task, config_file, batch):
        tried.append(batch)
        assert config_file.is_file()
        if batch > 2:
            raise OutOfMemoryError("killed")
        return Probe(0.5, 10.0)

    monkeypatch.setattr(running, "probe", measured)
    finetune(shapes, None, tmp_path / "run", minutes=4, only_write=True)
    written = yaml.safe_load((tmp_path / "run" / "finetune.yaml").read_text())
    assert tried == [3, 1]  # of 12 images, a quarter; then half of it
    seconds = written["SOLVER"]["MAX_ITER"] * 0.5
    assert 150 < seconds < 240
    with pytest.raises(ValueError, match="is enough for 0 iterations"):
        finetune(shapes, None, tmp_path / "short", minutes=0.1, only_write=True)


def test_settings_follow_the_situation():
    situation = Situation("detection", FACTS, "backbone", True, 8, 5000)
    settings = choose(situation)
    assert settings["INPUT.MIN_SIZE_TEST"].value == 480
    assert settings["SOLVER.EMA_DECAY"].value == 0.999
    assert settings["SOLVER.BASE_LR"].value == pytest.approx(1e-4 * 0.5**0.5, rel=1e-2)
    small_objects = DataFacts(1000, 200, 5, 480, 640, 6.0, 0.4)
    settings = choose(Situation("detection", small_objects, "backbone", True, 8, 5000))
    assert settings["INPUT.MIN_SIZE_TEST"].value == 800
    assert settings["MODEL.ANCHOR_GENERATOR.SIZES"].value[0][0] < 32
    frozen = choose(Situation("segmentation", FACTS, "model", True, 4, 500))
    assert frozen["MODEL.SPATIAL_MAMBA.BN"].value == "frozen"
    rare = DataFacts(1000, 200, 5, 480, 640, None, 0.9)
    settings = choose(Situation("segmentation", rare, "backbone", True, 8, 500))
    assert settings["MODEL.CLASS_WEIGHTS"].value == ("auto",)
    for task in TASKS:
        for start, patience in (("random", None), ("backbone", 4)):
            chosen = choose(Situation(task, FACTS, start, True, 8, 5000)).get("TEST.PATIENCE")
            assert (chosen and chosen.value) == patience, (task, start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1, "minutes": 1}, "exclude each other"),
        ({"epochs": -1}, "--epochs must be above 0"),
        ({"size": "x"}, "--size must be one of"),
        ({"resume": True}, "no training to continue"),
    ],
)
def test_arguments_are_checked(options, message, shapes, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(shapes, None, tmp_path / "run", **options)


def test_times_of_a_log(tmp_path):
    assert probing.logged_seconds(tmp_path) is None
    lines = ["iter: 0  loss: 1  time: 0.9000  data_time: 0.5", "iter: 1  time: 0.3000", "time: 0.2"]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    assert probing.logged_seconds(tmp_path) == 0.3
