"""Hooks of ours and other trainers: averaged weights, early stopping, freezing, throughput."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils.events import JSONWriter, get_event_storage
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from spatial_mamba_d2.detection.backbone import compile_backbone
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.train import run
from spatial_mamba_d2.detection.trainer import Trainer
from spatial_mamba_d2.detection.training_hooks import (
    EarlyStopping,
    FreezeByName,
    PlateauSchedule,
    ThroughputLogger,
    TrainingEnded,
    WeightAverage,
)
from spatial_mamba_d2.models import build_backbone, read_checkpoint
from spatial_mamba_d2.models.param_groups import build_adamw, layer_scales
from spatial_mamba_d2.system.seeding import seed_all


class Toy(nn.Module):
    """A model with Detectron2's interface: a dictionary of losses."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, batch):
        return {"loss": (self.second(self.first(batch)) - 1).square().mean()}


class ToyTrainer(SimpleTrainer):
    """One of Detectron2's without any of our code."""

    def __init__(self, model=None):
        torch.manual_seed(0)
        model = model or Toy()
        batches = torch.randn(100, 5, 3, generator=torch.Generator().manual_seed(1))
        super().__init__(model, list(batches), torch.optim.SGD(model.parameters(), 0.1))


def test_the_average_of_weights_in_any_trainer(tmp_path):
    """By its definition; exact when the training is resumed; exchanged while it is applied."""
    trainer = ToyTrainer()
    average = WeightAverage(trainer.model, 0.9)
    trainer.register_hooks([average])
    expected = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.after_step = lambda: (
        average.after_step(),
        [expected[k].lerp_(v, 0.1) for k, v in trainer.model.state_dict().items()],
    )
    trainer.train(0, 6)
    for name, value in average.average.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with average.applied():
        torch.testing.assert_close(trainer.model.state_dict(), expected)
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)

    parts = ToyTrainer()
    first = WeightAverage(parts.model, 0.9)
    parts.register_hooks([first])
    parts.train(0, 3)
    parts.iter = 2
    DetectionCheckpointer(parts.model, str(tmp_path), trainer=parts).save("model")
    again = ToyTrainer()
    second = WeightAverage(again.model, 0.9)
    again.register_hooks([second])
    DetectionCheckpointer(again.model, str(tmp_path), trainer=again).load(
        str(tmp_path / "model.pth")
    )
    again._data_loader_iter_obj = iter(again.data_loader[3:])
    again.train(3, 6)
    torch.testing.assert_close(
        second.average.module.state_dict(), average.average.module.state_dict(), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        WeightAverage(Toy(), 1)


def trained(cfg, iterations=None):
    seed_all(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.max_iter = iterations or trainer.max_iter
    trainer.train()
    return trainer


def test_the_average_is_evaluated_saved_and_resumed(make_cfg, tmp_path, monkeypatch):
    words = ("SOLVER.EMA_DECAY", 0.7, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    evaluated = []
    monkeypatch.setattr(
        Trainer, "test", lambda cfg, model, **_: evaluated.append(next(model.parameters()).clone())
    )
    whole = trained(make_cfg(*words, "OUTPUT_DIR", tmp_path / "whole"))
    average = whole.average.average.module.state_dict()
    assert torch.equal(evaluated[0], next(whole.average.average.module.parameters()))
    saved = read_checkpoint(tmp_path / "whole/model_final.pth")
    torch.testing.assert_close(saved["model"], average, rtol=0, atol=0)
    assert not torch.equal(next(whole.network.parameters()), evaluated[0])

    trained(make_cfg(*words), iterations=2)
    again = trained(make_cfg(*words))
    assert again.start_iter == 2
    for state, other in ((again.network, whole.network),
                         (again.average.average.module, whole.average.average.module)):  # fmt: skip
        torch.testing.assert_close(state.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)
    # Without an average, the weights in training go on
    (tmp_path / "output/last_checkpoint").write_text("model_0000001.pth")
    middle = read_checkpoint(tmp_path / "output/model_0000001.pth")
    plain = Trainer(make_cfg(*words, "SOLVER.EMA_DECAY", 0.0))
    plain.resume_or_load(resume=True)
    others = middle["trainer"]["hooks"]["WeightAverage"]["average"]
    torch.testing.assert_close(plain.network.state_dict(), others, rtol=0, atol=0)


def early(folder, scores, patience=2, max_iter=10, start_iter=0):
    """Train the toy with these scores, one of each iteration; the iterations that were done."""
    trainer = ToyTrainer()
    evaluation = hooks.EvalHook(1, lambda: {"bbox": {"AP": scores[min(trainer.iter, 9)]}})
    writer = hooks.PeriodicWriter([JSONWriter(str(Path(folder, "metrics.json")))], period=1)
    hook = EarlyStopping("bbox/AP", patience, 1, folder)
    trainer.register_hooks([evaluation, writer, hook])
    try:
        trainer.train(start_iter, max_iter)
    except TrainingEnded:
        return trainer.iter + 1
    return trainer.iter


@pytest.mark.parametrize(
    ("scores", "end"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 10),
        ([1, 3, 2, 4, 4, 4, 9, 9, 9, 9], 6),
        ([5, math.nan, 4, 9, 9, 9, 9, 9, 9, 9], 3),
        ([math.nan, math.nan, 4, 9, 9, 9, 9, 9, 9, 9], 2),
    ],
)
def test_an_early_end(scores, end, tmp_path):
    assert early(tmp_path, scores) == end


@pytest.mark.parametrize("killed_after", range(1, 6))
def test_patience_survives_a_kill(killed_after, tmp_path):
    """The resumed training has the scores of before, but none of iterations it does again."""
    scores = [1, 3, 2, 4, 4, 4, 9, 9, 9, 9]
    assert early(tmp_path, scores, max_iter=killed_after) == killed_after
    start = max(0, killed_after - 1)  # the checkpoint may be older than the last evaluation
    assert early(tmp_path, scores, start_iter=start) == 6
    assert early(tmp_path, scores, start_iter=6) == 7  # at once: no iteration was done
    with pytest.raises(ValueError, match="patience must be above 0, got 0"):
        EarlyStopping("bbox/AP", 0, 1, tmp_path)


PLATEAU_SCORES = [1, 3, 2, 3, 3, 4, 4, math.nan, 4, 9]
PLATEAU_RATES = [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]  # after each evaluation


def falling(folder, max_iter=10, start_iter=0):
    """Train the toy with those scores; the learning rates after each iteration."""
    trainer = ToyTrainer()
    multiplier = MultiStepParamScheduler([1.0, 1.0], milestones=[10], num_updates=20)
    schedule = LRMultiplier(trainer.optimizer, multiplier, 20)
    evaluation = hooks.EvalHook(1, lambda: {"bbox": {"AP": PLATEAU_SCORES[min(trainer.iter, 9)]}})
    writer = hooks.PeriodicWriter([JSONWriter(str(Path(folder, "metrics.json")))], period=1)
    hook = PlateauSchedule(schedule, 0.5, "bbox/AP", 2, 1, folder)
    rates = []
    record = hooks.CallbackHook(
        after_step=lambda _: rates.append(trainer.optimizer.param_groups[0]["lr"] / 0.1)
    )
    trainer.register_hooks(
        [hooks.LRScheduler(scheduler=schedule), evaluation, writer, hook, record]
    )
    trainer.train(start_iter, max_iter)
    return rates


def test_rates_fall_on_a_plateau(tmp_path):
    assert falling(tmp_path) == pytest.approx(PLATEAU_RATES)
    with pytest.raises(ValueError, match=r"factor must be in \(0, 1\), got 1"):
        PlateauSchedule(SimpleNamespace(base_lrs=[]), 1, "bbox/AP", 2, 1, tmp_path)


@pytest.mark.parametrize("killed_after", range(1, 9))
def test_a_plateau_survives_a_kill(killed_after, tmp_path):
    falling(tmp_path, max_iter=killed_after)
    start = max(0, killed_after - 1)  # the checkpoint may be older than the last evaluation
    assert falling(tmp_path, start_iter=start) == pytest.approx(PLATEAU_RATES[start:])


def test_the_plateau_of_the_trainer_is_exact_across_a_resume(make_cfg, tmp_path, monkeypatch):
    """Also where the checkpoint was written before the evaluation that lowered the rate."""
    scores = [3.0, 2.0, 1.0, 1.0, 5.0, 5.0]
    monkeypatch.setattr(
        Trainer, "test",
        lambda cfg, model, **_: {"segm": {"AP": scores[get_event_storage().iter]}},
    )  # fmt: skip
    words = ("SOLVER.LR_SCHEDULER_NAME", "WarmupPlateauLR", "SOLVER.PLATEAU_PATIENCE", 2,
             "SOLVER.GAMMA", 0.1, "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 3,
             "SOLVER.BASE_LR", 1e-3, "SOLVER.LAYER_DECAY", 0.8)  # fmt: skip
    whole = trained(make_cfg(*words, "OUTPUT_DIR", tmp_path / "whole"))
    lines = [*map(json.loads, (tmp_path / "whole/metrics.json").read_text().splitlines())]
    rates = [line["lr"] / 1e-3 for line in lines]
    assert rates[2:] == pytest.approx([1, 0.1, 0.1, 0.1])
    trained(make_cfg(*words), iterations=3)
    again = trained(make_cfg(*words))
    assert again.start_iter == 3
    torch.testing.assert_close(
        again.network.state_dict(), whole.network.state_dict(), rtol=1e-5, atol=1e-6
    )
    assert [g["lr"] for g in again.optimizer.param_groups] == pytest.approx(
        [g["lr"] for g in whole.optimizer.param_groups]
    )


def test_the_trainer_ends_early_and_stays_ended(root, arguments, tmp_path, monkeypatch):
    scores = iter([10.0, 20.0, 15.0, 20.0])
    monkeypatch.setattr(
        Trainer, "test", lambda cfg, model, **_: {"bbox": {"AP50": next(scores), "AP": 0.0}}
    )
    words = ("TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 2, "TEST.BEST_METRIC", "bbox/AP50",
             "SOLVER.MAX_ITER", 6)  # fmt: skip
    config = str(root / "configs/demo_mask_rcnn_spatial_mamba_t.yaml")
    results = run(arguments(*words, config_file=config))
    assert results["bbox"]["AP50"] == 20.0
    output = tmp_path / "output"
    lines = [*map(json.loads, (output / "metrics.json").read_text().splitlines())]
    assert [line["bbox/AP50"] for line in lines] == [10, 20, 15, 20]
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert read_checkpoint(output / "model_final.pth")["iteration"] == 3
    best = read_checkpoint(output / "model_best.pth")
    assert (best["best_score"], best["iteration"]) == (20.0, 1)
    run(arguments(*words, config_file=config, resume=True))  # the scores are used up
    assert "bbox/AP50 has not risen in 2 evaluations" in (output / "log.txt").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("TEST.BEST_METRIC", "segm/AP"), "TEST.BEST_METRIC must be .*bbox/AP .*got 'segm/AP'"),
        (("TEST.BEST_METRIC", "bbox/mAP"), "got 'bbox/mAP'"),
        (
            ("TEST.PATIENCE", 2),
            "TEST.PATIENCE 2 needs evaluations .* got TEST.EVAL_PERIOD 0",
        ),
        (("SOLVER.LR_SCHEDULER_NAME", "WarmupPlateauLR"), "WarmupPlateauLR needs evaluations"),
        (("SOLVER.PLATEAU_PATIENCE", 2), "only WarmupPlateauLR has it"),
        (("SOLVER.LR_SCHEDULER_NAME", "WarmupPlateauLR", "SOLVER.GAMMA", 1.0), "GAMMA must be bel"),
        (("TEST.PATIENCE", -1), "TEST.PATIENCE must be at least 0"),
        (("SOLVER.EMA_DECAY", 1.0), r"SOLVER.EMA_DECAY must be in \[0, 1\), got 1.0"),
        (("SOLVER.LAYER_DECAY", 0.0), r"SOLVER.LAYER_DECAY must be in \(0, 1\], got 0.0"),
        (("SOLVER.UNFREEZE_ITER", 5), "SOLVER.UNFREEZE_ITER 5: MODEL.FREEZE names no parameters"),
    ],
)
def test_bad_values_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [*map(str, words)])


def test_frozen_for_a_while_in_any_trainer():
    """Neither gradients nor weight decay nor momentum change them until then."""
    model = nn.Sequential(nn.BatchNorm1d(3), Toy())
    trainer = ToyTrainer(model)
    trainer.optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    hook = FreezeByName(model, ("0", "1.first"), until_iter=2)
    trainer.register_hooks([hook])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer.train(0, 2)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"1.second.weight", "1.second.bias"}
    trainer.train(2, 3)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {"0.weight", "0.running_mean", "1.first.weight"} <= changed
    with pytest.raises(ValueError, match=r"prefixes must be of the model's .*got '1.fir'"):
        FreezeByName(model, ("1.fir",))


def test_frozen_to_the_end(make_cfg):
    cfg = make_cfg("MODEL.FREEZE", ("backbone", "roi_heads.box_head"), "SOLVER.MAX_ITER", 2,
                   "TEST.EVAL_PERIOD", 100, "DATASETS.TEST_JSON", "", "DATASETS.TEST_IMAGES", "",
                   "DATASETS.TEST", ())  # fmt: skip
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    trainer.train()
    for name, value in trainer.network.state_dict().items():
        is_frozen = name.startswith(("backbone.", "roi_heads.box_head."))
        assert torch.equal(value, before[name]) == is_frozen, name
    optimized = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert optimized == sum(p.requires_grad for p in trainer.network.parameters())


def test_layer_decay(test_variant):
    """Stem, one block in each of four stages, and what comes after them."""
    model = nn.ModuleDict({"backbone": build_backbone(test_variant), "head": nn.Linear(2, 2)})
    scales = layer_scales(model, 0.5)
    expected = {
        "backbone.stem.conv1.conv.weight": 1 / 32,
        "backbone.stages.0.blocks.0.ln1.weight": 1 / 16,
        "backbone.stages.1.blocks.0.ln1.weight": 1 / 8,
        "backbone.stages.3.blocks.0.ln1.weight": 1 / 2,
        "backbone.output_norms.res5.weight": 1,
        "head.weight": 1,
    }
    assert {name: scales[name] for name in expected} == expected
    downsample = {s for n, s in scales.items() if ".stages.0.downsample." in n}
    assert downsample == {1 / 8}
    assert scales.keys() == {name for name, _ in model.named_parameters()}
    amp = SimpleNamespace(ENABLED=False, PRECISION="bfloat16")
    solver = SimpleNamespace(WEIGHT_DECAY=0.05, BASE_LR=1.0, BETAS=(0.9, 0.999), AMP=amp)
    optimizer = build_adamw(model, solver, 0.5)
    assert optimizer.defaults["fused"]
    scaled = SimpleNamespace(ENABLED=True, PRECISION="float16")
    assert not build_adamw(model, SimpleNamespace(**{**vars(solver), "AMP": scaled})).defaults[
        "fused"
    ]
    of = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert len(of) == len(scales)
    for name, parameter in model.named_parameters():
        assert of[parameter]["lr"] == scales[name]
        assert (of[parameter]["weight_decay"] == 0) == ("norm" in name)
    assert optimizer.param_groups[0]["lr"] == 1
    with pytest.raises(ValueError, match="without a Spatial-Mamba backbone"):
        layer_scales(nn.Linear(2, 2), 0.5)


def test_layer_decay_follows_the_schedule(make_cfg):
    cfg = make_cfg("SOLVER.LAYER_DECAY", 0.5, "SOLVER.WARMUP_ITERS", 2, "SOLVER.WARMUP_FACTOR", 0.5)
    trainer = Trainer(cfg)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert max(rates) == rates[0] == pytest.approx(cfg.SOLVER.BASE_LR / 2)
    assert min(rates) == pytest.approx(rates[0] / 32)


def test_throughput_and_memory_in_any_trainer():
    trainer = ToyTrainer()
    trainer.register_hooks([ThroughputLogger(5)])
    trainer.train(0, 3)
    assert len(trainer.storage.history("images_per_s").values()) == 3
    assert trainer.storage.history("images_per_s").latest() > 0
    assert trainer.storage.history("memory_mb").latest() > 50


@pytest.mark.long
def test_a_compiled_backbone_trains_the_same(make_cfg, tmp_path, monkeypatch):
    """As traced for inductor, which is not called here; names and averages stay as they are."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **_: compile_module(self, backend="aot_eager")
    )
    words = ("SOLVER.EMA_DECAY", 0.5, "SOLVER.MAX_ITER", 2, "INPUT.MIN_SIZE_TRAIN", (64,),
             "DATASETS.TEST_JSON", "", "DATASETS.TEST_IMAGES", "", "DATASETS.TEST", (),
             "MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", 0.0)  # fmt: skip
    plain = trained(make_cfg(*words, "OUTPUT_DIR", tmp_path / "plain"))
    compiled = trained(make_cfg(*words, "MODEL.COMPILE", True))
    assert compiled.network.backbone.bottom_up._compiled_call_impl is not None
    torch.testing.assert_close(
        compiled.network.state_dict(), plain.network.state_dict(), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match="MODEL.COMPILE must be False for a model without"):
        compile_backbone(nn.Linear(2, 2))


@pytest.mark.long
def test_a_compiled_backbone_takes_images_of_any_size():
    """Inductor compiles a second time, for all sizes, when the first one has changed."""
    torch.manual_seed(0)
    backbone = build_backbone("tiny", embed_dim=16, depths=(1, 1, 1, 1), drop_path_rate=0.0)
    compiled = copy.deepcopy(backbone)
    compile_backbone(compiled)
    for size in ((64, 96), (96, 64), (128, 96)):
        x = torch.randn(2, 3, *size)
        gradients = []
        for model in (backbone, compiled):
            model.zero_grad()
            sum(output.pow(3).mean() for output in model(x).values()).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for plain, fast in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5)
