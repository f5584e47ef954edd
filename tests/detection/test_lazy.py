"""Python configurations: the same networks, optimizers and schedules as the YAML recipes."""

from __future__ import annotations

import json
import shutil
import signal
from argparse import Namespace

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from spatial_mamba_d2 import model_zoo
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.lazy import load_lazy_config, run
from spatial_mamba_d2.detection.optimizer import build_optimizer, build_schedule
from spatial_mamba_d2.detection.step import AccumulatingTrainer
from spatial_mamba_d2.models import read_checkpoint
from spatial_mamba_d2.system.stopping import Stopped

RECIPES = [*model_zoo.list_models("detection"), *model_zoo.COUNTED]
DISTINCT = [n for n in RECIPES if not n.endswith(("_s", "_b", "_3x", "_lsj"))]
SIDE_PX = 64


def test_each_yaml_recipe_has_its_twin(root):
    files = {path.stem for path in (root / "configs/lazy").glob("*.py")}
    assert files == set(RECIPES)


def batch():
    """An image with one object that has everything."""
    mask = torch.zeros(1, SIDE_PX, SIDE_PX, dtype=torch.bool)
    mask[:, 10:50, 20:60] = True
    objects = Instances((SIDE_PX, SIDE_PX), gt_boxes=Boxes([[20.0, 10.0, 60.0, 50.0]]))
    objects.gt_classes, objects.gt_masks = torch.tensor([0]), BitMasks(mask)
    objects.gt_keypoints = Keypoints(torch.tensor([[[30.0, 30.0, 2.0]] * 17]))
    image = torch.randint(0, 255, (3, SIDE_PX, SIDE_PX)).float()
    semantic = torch.where(mask[0], 0, 3)
    return [{"image": image, "instances": objects, "sem_seg": semantic}]


@pytest.mark.parametrize("name", DISTINCT)
def test_the_networks_are_the_same(name, test_variant):
    """Their parameters by name, losses and results, with the same weights."""
    words = ["MODEL.DEVICE", "cpu", "MODEL.SPATIAL_MAMBA.VARIANT", test_variant]
    by_yaml = build_model(load_config(f"configs/{name}.yaml", words))
    cfg = model_zoo.get_lazy_config(name)
    cfg.model.backbone.bottom_up.variant = test_variant
    if "top_block" in cfg.model.backbone and "in_channels" in cfg.model.backbone.top_block:
        cfg.model.backbone.top_block.in_channels = 128
    by_lazy = instantiate(cfg.model)
    by_lazy.load_state_dict(by_yaml.state_dict())
    inputs = batch()
    losses, results = [], []
    for model in (by_yaml, by_lazy):
        torch.manual_seed(0)
        with EventStorage():
            losses.append(model.train()(inputs))
            (result,) = model.eval()(inputs)
        found = result["instances"].get_fields()
        found["pred_boxes"] = found["pred_boxes"].tensor
        results.append({**found, **{k: v for k, v in result.items() if k == "sem_seg"}})
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_training_is_the_same(name):
    """Rates and decay of the parameters, the schedule, the batch, the periods, the data."""
    cfg, lazy = load_config(f"configs/{name}.yaml"), load_lazy_config(name)
    model = torch.nn.ModuleDict({"norm": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    lazy.optimizer.params.model = model
    first, second = build_optimizer(cfg, model), instantiate(lazy.optimizer)
    for one, two in zip(first.param_groups, second.param_groups, strict=True):
        one.pop("params"), two.pop("params")
        assert one == two
    first, second = build_optimizer(cfg, model), instantiate(lazy.optimizer)
    schedule = build_schedule(cfg, first)
    other = LRMultiplier(second, instantiate(lazy.lr_multiplier), lazy.train.max_iter)
    for iteration in (0, 500, 999, 1000, 58639, 58640, 80630, 87000):
        schedule.last_epoch = other.last_epoch = iteration
        assert schedule.get_lr() == pytest.approx(other.get_lr())
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.train.eval_period == cfg.TEST.EVAL_PERIOD
    assert lazy.train.checkpointer.period == cfg.SOLVER.CHECKPOINT_PERIOD
    assert lazy.dataloader.train.batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.dataloader.data.recipe == name
    assert lazy.model.backbone.bottom_up.variant == cfg.MODEL.SPATIAL_MAMBA.VARIANT


@pytest.fixture
def arguments_of(shapes, test_variant, tmp_path):
    def make(*words, **flags):
        opts = [
            f"dataloader.data.train_json={shapes}/instances_train.json",
            f"dataloader.data.train_images={shapes}/images/training",
            f"dataloader.data.test_json={shapes}/instances_val.json",
            f"dataloader.data.test_images={shapes}/images/validation",
            "dataloader.data.overrides=[INPUT.MIN_SIZE_TRAIN,64,INPUT.MIN_SIZE_TEST,64,"
            "TEST.PICTURES,0]",
            "dataloader.train.batch_size=2", "dataloader.train.num_workers=0",
            "dataloader.test.num_workers=0",
            f"model.backbone.bottom_up.variant={test_variant}", "model.backbone.out_channels=32",
            "model.proposal_generator.head.in_channels=32",
            "model.proposal_generator.post_nms_topk=[40,40]",
            "model.roi_heads.num_classes=5", "model.roi_heads.batch_size_per_image=16",
            "model.roi_heads.box_head.input_shape.channels=32",
            "model.roi_heads.box_head.fc_dims=[32]",
            "model.roi_heads.box_predictor.input_shape.channels=32",
            "train.max_iter=4", "train.log_period=1", "train.checkpointer.period=2",
            "train.eval_period=0", "train.device=cpu", "optimizer.params.layer_decay=0.8",
            f"train.output_dir={tmp_path}/output", *words,
        ]  # fmt: skip
        defaults = {"config_file": "faster_rcnn_spatial_mamba_t", "resume": False,
                    "eval_only": False}  # fmt: skip
        return Namespace(opts=opts, **{**defaults, **flags})

    return make


def test_a_training_resumes_exactly_and_is_evaluated(arguments_of, tmp_path, curve):
    whole = run(arguments_of("train.eval_period=4", f"train.output_dir={tmp_path}/whole"))
    assert set(whole) == {"bbox"}
    output = tmp_path / "output"
    shutil.copytree(tmp_path / "whole", output)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    resumed = run(arguments_of("train.eval_period=4", resume=True))
    assert resumed["bbox"] == pytest.approx(whole["bbox"], nan_ok=True)
    losses = curve(output, "total_loss")
    assert losses == curve(tmp_path / "whole", "total_loss") and len(losses) == 4
    assert len((output / "metrics.json").read_text().splitlines()) == 8
    first, second = (
        read_checkpoint(tmp_path / name / "model_final.pth")["model"]
        for name in ("whole", "output")
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    weights = f"train.init_checkpoint={tmp_path}/whole/model_final.pth"
    evaluated = run(arguments_of(weights, eval_only=True))
    assert evaluated["bbox"] == pytest.approx(whole["bbox"], nan_ok=True)
    lines = (tmp_path / "whole/metrics.json").read_text().splitlines()
    assert "bbox/AP" in json.loads(lines[-1]) and (tmp_path / "whole/config.yaml").is_file()


def test_a_signal_saves_the_state(arguments_of, tmp_path, curve, monkeypatch):
    whole = arguments_of(f"train.output_dir={tmp_path}/whole")
    run(whole)
    step = AccumulatingTrainer.run_step

    def signalled(self):
        if self.iter == 2:
            signal.raise_signal(signal.SIGTERM)
        step(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(AccumulatingTrainer, "run_step", signalled)
        run(arguments_of())
    output = tmp_path / "output"
    assert (output / "last_checkpoint").read_text() == "model_0000002.pth"
    run(arguments_of(resume=True))
    assert curve(output, "total_loss") == curve(tmp_path / "whole", "total_loss")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.max_iters=3"], r"no such key in .*: train.max_iters; \+train.max_iters=... adds"),
        (["train.max_iter"], "overrides must be key=value, got 'train.max_iter'"),
        (["MODEL.WEIGHTS", "a.pth"], "overrides must be key=value, got 'MODEL.WEIGHTS'"),
    ],
)
def test_wrong_overrides_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        load_lazy_config("mask_rcnn_spatial_mamba_t", words)


def test_what_is_missing_is_named(arguments_of):
    with pytest.raises(FileNotFoundError, match="no such file: .*resnet"):
        load_lazy_config("resnet")
    with pytest.raises(ValueError, match="train.init_checkpoint must name weights to evaluate"):
        run(arguments_of(eval_only=True))
    with pytest.raises(ValueError, match="name must be of a detector"):
        model_zoo.get_lazy_config("spatial_mamba_t")
    added = load_lazy_config("mask_rcnn_spatial_mamba_t", ["+model.vis_period=7"])
    assert added.model.vis_period == 7
