"""Training and evaluation through the functions that the command line calls."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from spatial_mamba_d2 import config
from spatial_mamba_d2.data.shapes import generate_shapes
from spatial_mamba_d2.detection.launch import launch
from spatial_mamba_d2.detection.train import run, setup
from spatial_mamba_d2.detection.trainer import Trainer
from spatial_mamba_d2.models.checkpoints.reading import read_checkpoint
from spatial_mamba_d2.system.cli import build_training_parser
from spatial_mamba_d2.system.seeding import seed_all
from tests.conftest import forks_can_train

CONFIG = "configs/demo_mask_rcnn_spatial_mamba_t.yaml"


@pytest.fixture
def run_arguments(root, arguments):
    """``run_arguments(KEY, VALUE, ..., eval_only=..., resume=...)``"""
    return partial(arguments, config_file=str(root / CONFIG))


def losses(cfg, iterations=None):
    """The total loss of each iteration, as computed, and the trainer."""
    seed_all(0)  # as default_setup does
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    recorded = []
    write = trainer._trainer._write_metrics

    def record(loss_dict, *args, **kwargs):
        recorded.append(sum(loss.item() for loss in loss_dict.values()))
        write(loss_dict, *args, **kwargs)

    trainer._trainer._write_metrics = record
    if iterations is not None:
        trainer.max_iter = iterations
    trainer.train()
    return recorded, trainer


RETINANET = (
    "MODEL.META_ARCHITECTURE", "RetinaNet",
    "MODEL.MASK_ON", False,
    "MODEL.BACKBONE.NAME", "build_spatial_mamba_retinanet_fpn_backbone",
    "MODEL.SPATIAL_MAMBA.OUT_FEATURES", ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"],
    "MODEL.RETINANET.NUM_CLASSES", 5,
    "MODEL.RETINANET.NUM_CONVS", 1,
)  # fmt: skip


@pytest.mark.parametrize("architecture", [(), RETINANET], ids=["MaskRCNN", "RetinaNet"])
def test_resume_continues_the_same_curve(architecture, make_cfg, tmp_path):
    """With crops, flips, several scales, drop path, sampled proposals or averaged anchors."""
    more = (*architecture, "INPUT.RESIZE_CROP.ENABLED", True, "INPUT.RESIZE_CROP.SIZES", (70, 90),
            "INPUT.RESIZE_CROP.CROP_RANGE", (50, 60), "TEST.EVAL_PERIOD", 100)  # fmt: skip
    whole, _ = losses(make_cfg(*more, "OUTPUT_DIR", tmp_path / "whole"))
    first, _ = losses(make_cfg(*more), iterations=3)
    torch.rand(7)  # whatever the generators' state
    second, trainer = losses(make_cfg(*more))
    assert trainer.start_iter == 3 and len(whole) == 6
    assert first + second == pytest.approx(whole, rel=1e-6)
    states = [
        read_checkpoint(Path(folder) / "model_final.pth")["model"]
        for folder in (tmp_path / "whole", tmp_path / "output")
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_on_the_cpu(precision, make_cfg, monkeypatch):
    monkeypatch.setattr(config, "resolve_device", lambda cfg: None)  # which refuses float16
    cfg = make_cfg("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision,
                   "SOLVER.CLIP_GRADIENTS.ENABLED", True)  # fmt: skip
    curve, trainer = losses(cfg)
    assert len(curve) == 6 and all(math.isfinite(x) for x in curve)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer._trainer.scaler.is_enabled() == (precision == "float16")


def test_train_then_evaluate_only(run_arguments, tmp_path):
    output = tmp_path / "output"
    trained = run(run_arguments("TEST.PICTURES", 3))
    assert trained and set(trained) == {"bbox", "segm"}
    assert len(list((output / "pictures").glob("*.png"))) == 3
    assert (output / "model_final.pth").is_file() and (output / "metrics.json").is_file()
    assert list(output.glob("events.out.tfevents*"))
    weights = ("MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", tmp_path / "other")
    evaluated = run(run_arguments(*weights, eval_only=True))
    resumed = run(run_arguments(eval_only=True, resume=True))
    for results in (evaluated, resumed):
        for task in trained:
            assert results[task] == pytest.approx(trained[task], nan_ok=True)


def test_finished_training_resumes_to_its_evaluation(run_arguments, tmp_path, capfd):
    """With scores in the line of the last iteration, and no line for no iteration."""
    first = run(run_arguments())
    metrics = tmp_path / "output/metrics.json"
    before = metrics.read_text()
    lines = [*map(json.loads, before.splitlines())]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert ["bbox/AP" in line for line in lines] == [False] * 5 + [True]
    assert lines[5]["bbox/AP"] == pytest.approx(first["bbox"]["AP"], nan_ok=True)
    capfd.readouterr()
    again = run(run_arguments(resume=True))
    assert again["bbox"] == pytest.approx(first["bbox"], nan_ok=True)
    assert metrics.read_text() == before
    assert "lr: N/A" not in capfd.readouterr().out
    metrics.write_text("")  # as if the last evaluation had not been finished
    run(run_arguments(resume=True))
    (line,) = map(json.loads, metrics.read_text().splitlines())
    assert line["iteration"] == 5 and "bbox/AP" in line


@pytest.mark.parametrize("limit", [3, 100, 150])
def test_evaluator_honours_detections_per_image(limit, make_cfg):
    cfg = make_cfg("TEST.DETECTIONS_PER_IMAGE", limit)
    (coco,) = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])._evaluators
    assert coco._max_dets_per_image == [1, 10, limit]


def test_evaluation_needs_weights(run_arguments):
    with pytest.raises(ValueError, match="no weights to evaluate: set MODEL.WEIGHTS"):
        run(run_arguments(eval_only=True))


def test_missing_weights_are_named(run_arguments, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*absent.pth"):
        run(run_arguments("MODEL.WEIGHTS", tmp_path / "absent.pth"))


def test_accumulation_must_divide_the_batch(make_cfg):
    message = "IMS_PER_BATCH must be a multiple of 1 processes x 3 SOLVER.ACCUMULATION_STEPS, got 2"
    with pytest.raises(ValueError, match=message):
        Trainer(make_cfg("SOLVER.ACCUMULATION_STEPS", 3))


# All anchors and proposals take part, and each image has the same number of them, so that means
# over processes are means over images; only ground-truth boxes are positive.
DETERMINISTIC = (
    "MODEL.SPATIAL_MAMBA.BN", "frozen",
    "MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", "0.0",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000",
    "MODEL.RPN.POSITIVE_FRACTION", "1.0",
    "MODEL.RPN.NMS_THRESH", "1.0",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "40",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0",
    "MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.99]",
)  # fmt: skip


@pytest.fixture
def equal_images(overrides, tmp_path):
    """Overrides for square images that have exactly two objects each."""
    folder = generate_shapes(tmp_path / "squares", num_train=16, num_val=1, image_px=(64, 64))
    content = json.loads((folder / "instances_train.json").read_text())
    images, annotations = [], []
    for image in content["images"]:
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        large = [a for a in mine if not a["iscrowd"] and a["area"] > 60]
        if len(large) >= 2:
            images.append(image)
            annotations += large[:2]
    assert len(images) >= 4
    path = tmp_path / "equal.json"
    path.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    return [*overrides, *DETERMINISTIC, "DATASETS.TRAIN_JSON", str(path),
            "DATASETS.TRAIN_IMAGES", str(folder / "images/training"),
            "INPUT.MIN_SIZE_TRAIN", "(64,)",
            "SOLVER.MAX_ITER", "5", "TEST.EVAL_PERIOD", "100"]  # fmt: skip


def test_accumulation_changes_nothing_but_memory(equal_images, make_cfg, tmp_path):
    curves = []
    for steps in (1, 2):
        cfg = make_cfg(*equal_images, "SOLVER.ACCUMULATION_STEPS", steps,
                       "OUTPUT_DIR", tmp_path / str(steps))  # fmt: skip
        curves.append(losses(cfg)[0])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def raw_losses(output: Path) -> list[dict[str, float]]:
    """Of each iteration; so short a training writes a line for each."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    by_iteration = {line["iteration"]: line for line in lines if "total_loss" in line}
    return [{k: v for k, v in line.items() if "loss" in k} for line in by_iteration.values()]


@pytest.mark.slow
def test_two_processes_equal_one(
    equal_images, run_arguments, as_under_torchrun, tmp_path, monkeypatch
):
    """Half the batch each, gloo, the same losses.

    The processes that the tool starts itself are forked here, to save the time of a start.
    """
    words = [*equal_images, "SOLVER.MAX_ITER", "3", "OUTPUT_DIR"]
    run(run_arguments(*words, tmp_path / "one"))
    arguments = run_arguments(*words, tmp_path / "torchrun")
    as_under_torchrun(launch, run, 1, 1, 0, "auto", (arguments,))
    if forks_can_train():  # others would not know the variant
        start = mp.start_processes
        monkeypatch.setattr(
            mp, "start_processes", lambda *a, **kw: start(*a, **{**kw, "start_method": "fork"})
        )
        launch(run, 2, args=(run_arguments(*words, tmp_path / "flag"),))
    names = [name for name in ("one", "torchrun", "flag") if (tmp_path / name).exists()]
    curves = {name: raw_losses(tmp_path / name) for name in names}
    assert len(curves["one"]) == 3
    for name in names[1:]:
        for one, two in zip(curves["one"], curves[name], strict=True):
            assert two == pytest.approx(one, rel=1e-3), name


def test_launch_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="--dist-url must be tcp://HOST:PORT for several machines"):
        launch(print, 1, num_machines=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--num-gpus must be at most 1, the GPUs here, got 2"):
        launch(print, 2)


def test_command_line_without_a_file(tmp_path):
    """Detectron2 writes the contents of a file into its log, and takes "" for none."""
    parser = build_training_parser(None)
    args = parser.parse_args(["OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"])
    assert setup(args).OUTPUT_DIR == str(tmp_path)


def test_command_line_explains_itself(root, run_tool):
    done = run_tool("train_net.py", "--config-file", root / CONFIG, "SOLVER.BASELR", 1)
    assert done.returncode != 0
    assert (
        "unknown config key SOLVER.BASELR; the nearest valid one is SOLVER.BASE_LR" in done.stderr
    )
