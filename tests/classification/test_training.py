"""Training, resuming and evaluating through the functions that the command line calls."""

from __future__ import annotations

import copy
import json
import math
import shutil
from itertools import islice

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import Mixup
from torch.nn import functional as F

from spatial_mamba_d2.classification.config import load_config
from spatial_mamba_d2.classification.data import build_data
from spatial_mamba_d2.classification.module import Classifier
from spatial_mamba_d2.classification.train import run
from spatial_mamba_d2.data.imagenet import read_sample
from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.models.checkpoints.names import to_official
from spatial_mamba_d2.models.checkpoints.reading import WeightsError, read_checkpoint
from spatial_mamba_d2.models.variants import VARIANTS
from spatial_mamba_d2.system.seeding import derive_seed, seed_all
from spatial_mamba_d2.training import loggers
from tests.conftest import Interrupted

LAST = "output/last.ckpt"
BEFORE_NORM = ("reduce.conv.bias", "project.conv.bias")


def test_the_recipe_equals_a_plain_loop(arguments, tmp_path, curve):
    """Mixup and CutMix, smoothing, MESA after the first epoch, clipping, AdamW, cosine, average."""
    epochs, epoch, warmup, decay, weight = 4, 3, 3, 0.9, 1.5
    words = ("SOLVER.MESA.WEIGHT", weight, "SOLVER.MESA.START", 0.25, "SEED", 3)
    cfg = load_config(None, arguments(*words).opts)
    data = build_data(cfg)
    data.setup("fit")
    assert data.epoch_iterations == epoch
    torch.manual_seed(cfg.SEED)
    model = Classifier(cfg, tuple(data.classes)).model  # before it draws, seeded as train() is
    first = copy.deepcopy(model.state_dict())
    average = copy.deepcopy(model)
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    )
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    scale = 8 / 512
    losses, mesa_losses = {}, {}
    for i, (image, target) in enumerate(islice(data.train_dataloader(), epochs * epoch)):
        if i < warmup:
            rate = 5e-7 + (0.064 - 5e-7) * i / warmup
        else:
            progress = (i - warmup) / (epochs * epoch - warmup)
            rate = 5e-6 + (0.064 - 5e-6) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        seed_all(derive_seed(3, "step", i, 0))
        image, target = mixup(image, target)
        model.train()
        log_p = F.log_softmax(model(image), dim=-1)
        loss = -(target * log_p).sum(-1).mean()
        if i >= epoch:
            with torch.no_grad():
                taught = F.softmax(average.eval()(image), dim=-1)
            mesa_losses[i] = -weight * (taught * log_p).sum(-1).mean()
            loss = loss + mesa_losses[i]
        losses[i] = loss.item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        with torch.no_grad():
            pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
            for kept, new in pairs:
                if kept.is_floating_point():
                    kept.mul_(decay).add_((1 - decay) * new)

    run(arguments(*words))
    content = read_checkpoint(tmp_path / LAST)
    assert curve(tmp_path / "output") == pytest.approx(losses, rel=1e-4)
    expected = {i: value.item() for i, value in mesa_losses.items()}
    assert curve(tmp_path / "output", "loss_mesa") == pytest.approx(expected, rel=1e-4)
    for key, network in (("training_model", model), ("state_dict", average)):
        for name, value in network.state_dict().items():
            # Of a bias in front of batch norm, also with a ReLU and a product between them, hardly
            # more than rounding is left of the gradient, which AdamW blows up.
            if value.is_floating_point() and not name.endswith(BEFORE_NORM):
                way = (value - first[name]).norm()
                assert way > 0, name
                # AdamW lifts rounding; alpha, which hardly changes, may be off by a ninth
                bound = 0.2 if name.endswith("fusion.alpha") else 0.1
                assert (content[key][name] - value).norm() < bound * way, name


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_resume_continues_the_same_curve(
    accumulation_steps, arguments, tmp_path, interrupted, curve
):
    """With all augmentations, mixing, drop path, average and MESA; after the second epoch."""
    more = ("SOLVER.ACCUMULATION_STEPS", accumulation_steps, "TEST.EVAL_EPOCHS", 2)
    whole = run(arguments(*more, "OUTPUT_DIR", tmp_path / "whole"))
    with interrupted(Classifier, 7):
        run(arguments(*more))
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 6
    torch.rand(7)  # whatever the generators' state
    np.random.rand(7)
    resumed = run(arguments(*more, resume=True))
    for key in ("loss", "lr"):
        expected = curve(tmp_path / "whole", key)
        assert list(expected) == list(range(12))
        assert curve(tmp_path / "output", key) == pytest.approx(expected, rel=1e-6)
    assert resumed == pytest.approx(whole, rel=1e-6)
    contents = [read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "output")]
    for key in ("state_dict", "training_model"):
        for name, value in contents[0][key].items():
            torch.testing.assert_close(contents[1][key][name], value, rtol=1e-5, atol=1e-6)


def planned_scores(monkeypatch, scores):
    """Evaluations, one after each epoch of 3 iterations, get these instead of what they find."""
    finish = Classifier.finish_evaluation

    def planned(module, found):
        finish(module, {"top1": scores[module.iteration // 3 - 1]})

    monkeypatch.setattr(Classifier, "finish_evaluation", planned)


@pytest.mark.parametrize("killed_in", [None, "training", "evaluation"])
def test_patience_ends_the_training_also_across_a_kill(
    killed_in, arguments, tmp_path, curve, interrupted, monkeypatch
):
    """The second of 20 is no gain, and the best checkpoint is of the first one."""
    planned_scores(monkeypatch, [10.0, 20.0, 15.0, 20.0, 30.0, 40.0])
    words = ("SOLVER.EPOCHS", 6, "TEST.EVAL_EPOCHS", 1, "TEST.PATIENCE", 2)
    words += ("SOLVER.LOGGERS", ("csv",))
    output = tmp_path / "output"
    if killed_in == "training":
        with interrupted(Classifier, 10):
            run(arguments(*words))
    elif killed_in == "evaluation":
        with monkeypatch.context() as patch:
            write = Classifier.write_scores

            def killed(module, *args):
                if module.iteration == 9:
                    raise Interrupted
                return write(module, *args)

            patch.setattr(Classifier, "write_scores", killed)
            with pytest.raises(Interrupted):
                run(arguments(*words))
    assert run(arguments(*words, resume=killed_in is not None)) == {"top1": 20.0}
    assert curve(output, "top1") == {2: 10.0, 5: 20.0, 8: 15.0, 11: 20.0}
    assert max(curve(output)) == 11
    assert read_checkpoint(output / "last.ckpt")["global_step"] == 12
    assert read_checkpoint(output / "best.ckpt")["global_step"] == 6
    assert "ends early: top1 has not risen in 2 evaluations" in (output / "log.txt").read_text()
    assert run(arguments(*words, resume=True)) == {"top1": 20.0}  # and trains no further
    assert max(curve(output)) == 11
    assert not (output / "tensorboard").exists()
    rows = (output / "metrics.csv").read_text().splitlines()
    assert rows[0] == "iteration,name,value" and "8,top1,15.0" in rows


def test_a_logger_that_fails_is_switched_off(arguments, tmp_path, monkeypatch):
    def failing(cfg):
        raise ConnectionError("no network")

    monkeypatch.setitem(loggers.LOGS, "csv", failing)
    run(arguments("SOLVER.EPOCHS", 2, "SOLVER.LOGGERS", ("csv", "tensorboard")))
    text = (tmp_path / "output/log.txt").read_text()
    assert text.count("SOLVER.LOGGERS: csv has failed and is switched off: ConnectionError") == 1
    assert list((tmp_path / "output").glob("tensorboard/events.out.tfevents*"))
    for words, message in (
        (("SOLVER.LOGGERS", "('comet',)"), "SOLVER.LOGGERS must be among .*, got comet"),
        (("TEST.PATIENCE", "2", "TEST.EVAL_EPOCHS", "0"), "TEST.PATIENCE 2 needs evaluations"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(None, words)


def test_train_then_evaluate(arguments, tmp_path, curve):
    """Best and last checkpoint, logs; scores against a count by hand; timm reads the checkpoint."""
    output = tmp_path / "output"
    trained = run(arguments("TEST.EVAL_EPOCHS", 1))
    assert set(trained) == {"top1", "training_top1"}  # no top-5 of five classes
    assert list(output.glob("tensorboard/events.out.tfevents*"))
    evaluations = curve(output, "top1")
    assert list(evaluations) == [2, 5, 8, 11]
    best, last = (read_checkpoint(output / f"{name}.ckpt") for name in ("best", "last"))
    assert last["global_step"] == 12 and last["classes"][0] == "circle"
    best_step = max(evaluations, key=lambda i: (evaluations[i], -i)) + 1
    assert best["global_step"] == best_step

    assert run(arguments(eval_only=True)) == {"top1": pytest.approx(max(evaluations.values()))}
    content = json.loads((output / "scores_val.json").read_text())
    assert content["weights"].endswith("best.ckpt") and content["skipped_images"] == 0
    assert content["protocol"] == {"short_px": 40, "crop_px": 36}
    weights = ("MODEL.WEIGHTS", output / "last.ckpt")
    assert run(arguments(*weights, eval_only=True))["top1"] == pytest.approx(trained["top1"])

    data = build_data(load_config(None, arguments().opts))
    data.setup("validate")
    safe = output / "weights.pth"
    torch.save(last["state_dict"], safe)
    model = timm.create_model(
        "spatial_mamba_tiny", num_classes=5, checkpoint_path=str(safe), **VARIANTS["test"]
    ).eval()
    right = 0
    for sample in data.splits["val"]:
        image, target = read_sample(sample)
        with torch.no_grad():
            right += model(data.test_transform(image)[None]).argmax().item() == target
    assert trained["top1"] == pytest.approx(100 * right / 15)


def test_without_average_mixing_or_clipping(arguments, tmp_path):
    scores = run(
        arguments("SOLVER.EMA_DECAY", 0.0, "SOLVER.MESA.WEIGHT", 0.0, "INPUT.MIXING.MIXUP", 0.0,
                  "INPUT.MIXING.CUTMIX", 0.0, "SOLVER.CLIP_GRADIENTS.ENABLED", False,
                  "SOLVER.IMS_PER_BATCH", 5, "SOLVER.EPOCHS", 2)
    )  # fmt: skip
    assert set(scores) == {"top1"}
    content = read_checkpoint(tmp_path / LAST)
    assert "training_model" not in content and content["global_step"] == 10


def test_bfloat16_on_the_cpu(arguments, tmp_path, curve):
    run(arguments("SOLVER.AMP.PRECISION", "bfloat16"))
    losses = curve(tmp_path / "output")
    assert all(map(math.isfinite, losses.values()))
    content = read_checkpoint(tmp_path / LAST)
    assert all(v.dtype != torch.bfloat16 for v in content["state_dict"].values())


def test_starting_weights(arguments, tmp_path):
    """Official names; the average begins at them; other classes need a word."""
    source = build_classifier("test", 7)
    state = {to_official(name): value for name, value in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "imagenet.pth")
    weights = ("MODEL.WEIGHTS", tmp_path / "imagenet.pth", "SOLVER.EPOCHS", 2)
    with pytest.raises(WeightsError, match=r"head.weight is \[7, 128\], must be \[5, 128\]"):
        run(arguments(*weights))
    # So slow a training that the average must still be where it began.
    slow = ("SOLVER.BASE_LR", 1e-9, "SOLVER.MIN_LR", 0.0, "SOLVER.WARMUP_LR", 0.0)
    run(arguments(*weights, *slow, "MODEL.WEIGHTS_SKIP", "('head.',)"))
    kept = read_checkpoint(tmp_path / LAST)["state_dict"]
    for name in ("stem.conv1.conv.weight", "stages.3.blocks.0.mlp.fc1.weight"):
        torch.testing.assert_close(kept[name], source.state_dict()[name])


def test_bad_starts_are_named(arguments, tmp_path):
    with pytest.raises(ValueError, match="multiple of 2 x 1 processes x 1 SOLVER.ACC.*got 7"):
        run(arguments("SOLVER.IMS_PER_BATCH", 7))
    with pytest.raises(ValueError, match="multiple of 1 processes x 3 SOLVER.ACCUMULATION_STEPS"):
        run(arguments("SOLVER.ACCUMULATION_STEPS", 3))
    with pytest.raises(ValueError, match="NUM_CLASSES must be 5, .*got 6"):
        run(arguments("MODEL.NUM_CLASSES", 6))
    with pytest.raises(
        FileNotFoundError, match="DATASETS.ROOT: no such folder: .*datasets/README.md"
    ):
        run(arguments("DATASETS.ROOT", tmp_path))
    with pytest.raises(ValueError, match="no weights to evaluate: set MODEL.WEIGHTS"):
        run(arguments(eval_only=True))


def test_broken_images_are_skipped_and_counted(arguments, tmp_path, sample_images, caplog):
    root = tmp_path / "images"
    shutil.copytree(sample_images, root)
    broken = [root / f"{split}/star/000001.jpg" for split in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="star/000001.jpg cannot be decoded"):
        run(arguments("DATASETS.ROOT", root))
    (root / "val/no_class").mkdir()
    run(arguments("DATASETS.ROOT", root, "DATASETS.ON_ERROR", "skip", resume=True))
    content = json.loads((tmp_path / "output/scores_val.json").read_text())
    assert (content["images"], content["skipped_images"]) == (14, 1)
    assert content["skipped"] == {"broken when read": 1, "folder that is not a class": 1}
    for kind, path in zip(("sample", "image"), broken, strict=True):
        assert f"skipped broken {kind} no. 1: image file {path}" in caplog.text


def test_training_without_a_test_split(arguments, tmp_path):
    assert run(arguments("DATASETS.TEST", "", "SOLVER.EPOCHS", 1, "SOLVER.WARMUP_EPOCHS", 0)) == {}
    assert (tmp_path / "output/last.ckpt").is_file()
    assert not (tmp_path / "output/best.ckpt").exists()


@pytest.mark.slow
def test_two_processes_train_and_count_as_one(root, arguments, as_under_torchrun, tmp_path):
    """Without what differs by process (mixing, batch statistics): the same losses and scores."""
    words = ["SOLVER.EPOCHS", "2", "MODEL.SPATIAL_MAMBA.BN", "frozen",
             "INPUT.MIXING.MIXUP", "0.0", "INPUT.MIXING.CUTMIX", "0.0", "SOLVER.BASE_LR", "0.0064",
             "MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", "0.0", "OUTPUT_DIR"]  # fmt: skip
    config_file = str(root / "configs/demo_spatial_mamba_t.yaml")
    run(arguments(*words, tmp_path / "1", config_file=config_file))
    as_under_torchrun(run, arguments(*words, tmp_path / "2", config_file=config_file))
    scores, weights = {}, {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        scores[processes] = json.loads((folder / "scores_val.json").read_text())["top1"]
        weights[processes] = read_checkpoint(folder / "last.ckpt")["training_model"]
    assert scores[1] == pytest.approx(scores[2])
    for name, value in weights[1].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[2][name], value, rtol=1e-2, atol=2e-4)
