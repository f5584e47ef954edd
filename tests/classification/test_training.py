"""Training, resuming and evaluating through the functions that the command line calls."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from timm.data.mixup import Mixup
from torch.nn import functional as F

from spatial_mamba_d2.classification.config import load_config
from spatial_mamba_d2.classification.module import Classifier
from spatial_mamba_d2.classification.train import build_data, train
from spatial_mamba_d2.classification.train import test as evaluate
from spatial_mamba_d2.data.imagenet import read_picture
from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.models.checkpoints.loading import WeightsError, read_checkpoint, to_official
from spatial_mamba_d2.training import fit as launch

LAST = "output/last.ckpt"


def curve(folder, key="loss"):
    """``{iteration: value}`` of the metrics file; a repeated iteration keeps its last value."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line[key] for line in lines if key in line}


class Interrupted(RuntimeError):
    pass


@pytest.mark.usefixtures("narrow")
def test_the_recipe_equals_a_plain_loop(arguments, tmp_path):
    """Mixup and CutMix, smoothing, MESA after the first epoch, clipping, AdamW, cosine, average."""
    epochs, epoch, warmup, decay, weight = 4, 3, 3, 0.9, 1.5
    words = ("SOLVER.MESA.WEIGHT", weight, "SOLVER.MESA.START", 0.25, "SEED", 3)
    cfg = launch.start(arguments(*words), load_config)
    data = build_data(cfg)
    data.setup("fit")
    assert data.iterations() == epochs * epoch
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
    for i, (image, target) in enumerate(data.train_dataloader()):
        if i < warmup:
            rate = 5e-7 + (0.064 - 5e-7) * i / warmup
        else:
            progress = (i - warmup) / (epochs * epoch - warmup)
            rate = 5e-6 + (0.064 - 5e-6) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        seed = 3 * 1_000_003 + i * 1009
        torch.manual_seed(seed)
        np.random.seed(seed)
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

    train(arguments(*words))
    content = read_checkpoint(tmp_path / LAST)
    assert curve(tmp_path / "output") == pytest.approx(losses, rel=1e-4)
    expected = {i: value.item() for i, value in mesa_losses.items()}
    assert curve(tmp_path / "output", "loss_mesa") == pytest.approx(expected, rel=1e-4)
    for key, network in (("training_model", model), ("state_dict", average)):
        for name, value in network.state_dict().items():
            # A bias in front of batch norm has no gradient but rounding, which AdamW blows up.
            if value.is_floating_point() and not name.endswith("project.conv.bias"):
                way = (value - first[name]).norm()
                assert way > 0, name
                assert (content[key][name] - value).norm() < 0.1 * way, name  # AdamW lifts rounding


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("parts", [1, 2])
def test_resume_continues_the_same_curve(parts, arguments, tmp_path, monkeypatch):
    """With all augmentations, mixing, drop path, average and MESA; after the second epoch."""
    more = ("SOLVER.ACCUMULATION_STEPS", parts, "TEST.EVAL_EPOCHS", 2)
    whole = train(arguments(*more, "OUTPUT_DIR", tmp_path / "whole"))
    step = Classifier.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 7:
            raise Interrupted
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(Interrupted):
            train(arguments(*more))
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 6
    torch.rand(7)  # whatever the generators' state
    np.random.rand(7)
    resumed = train(arguments(*more, resume=True))
    for key in ("loss", "lr"):
        expected = curve(tmp_path / "whole", key)
        assert list(expected) == list(range(12))
        assert curve(tmp_path / "output", key) == pytest.approx(expected, rel=1e-6)
    assert resumed == pytest.approx(whole, rel=1e-6)
    contents = [read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "output")]
    for key in ("state_dict", "training_model"):
        for name, value in contents[0][key].items():
            torch.testing.assert_close(contents[1][key][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("narrow")
def test_train_then_evaluate(arguments, tmp_path):
    """Best and last checkpoint, logs; scores against a count by hand; timm reads the checkpoint."""
    output = tmp_path / "output"
    trained = train(arguments("TEST.EVAL_EPOCHS", 1))
    assert set(trained) == {"top1", "training_top1"}  # no top-5 of five classes
    assert list(output.glob("tensorboard/events.out.tfevents*"))
    evaluations = curve(output, "top1")
    assert list(evaluations) == [2, 5, 8, 11]
    best, last = (read_checkpoint(output / f"{name}.ckpt") for name in ("best", "last"))
    assert last["global_step"] == 12 and last["classes"][0] == "circle"
    best_step = max(evaluations, key=lambda i: (evaluations[i], -i)) + 1
    assert best["global_step"] == best_step

    assert evaluate(arguments()) == {"top1": pytest.approx(max(evaluations.values()))}
    content = json.loads((output / "scores_val.json").read_text())
    assert content["weights"].endswith("best.ckpt") and content["skipped_images"] == 0
    assert content["protocol"] == {"short_px": 40, "crop_px": 36}
    weights = ("MODEL.WEIGHTS", output / "last.ckpt")
    assert evaluate(arguments(*weights))["top1"] == pytest.approx(trained["top1"])

    cfg = launch.start(arguments(), load_config)
    data = build_data(cfg)
    data.setup("validate")
    safe = output / "weights.pth"
    torch.save(last["state_dict"], safe)
    model = timm.create_model("spatial_mamba_tiny", num_classes=5, checkpoint_path=str(safe)).eval()
    right = 0
    for path, target in data.splits["val"]:
        with torch.no_grad():
            right += model(data.test_transform(read_picture(path))[None]).argmax().item() == target
    assert trained["top1"] == pytest.approx(100 * right / 15)


@pytest.mark.usefixtures("narrow")
def test_without_average_mixing_or_clipping(arguments, tmp_path):
    scores = train(
        arguments("SOLVER.EMA_DECAY", 0.0, "SOLVER.MESA.WEIGHT", 0.0, "INPUT.MIXING.MIXUP", 0.0,
                  "INPUT.MIXING.CUTMIX", 0.0, "SOLVER.CLIP_GRADIENTS.ENABLED", False,
                  "SOLVER.IMS_PER_BATCH", 5, "SOLVER.EPOCHS", 2)
    )  # fmt: skip
    assert set(scores) == {"top1"}
    content = read_checkpoint(tmp_path / LAST)
    assert "training_model" not in content and content["global_step"] == 10


@pytest.mark.usefixtures("narrow")
def test_bfloat16_on_the_cpu(arguments, tmp_path):
    train(arguments("SOLVER.AMP.PRECISION", "bfloat16"))
    losses = curve(tmp_path / "output")
    assert all(map(math.isfinite, losses.values()))
    content = read_checkpoint(tmp_path / LAST)
    assert all(v.dtype != torch.bfloat16 for v in content["state_dict"].values())


@pytest.mark.usefixtures("narrow")
def test_starting_weights(arguments, tmp_path):
    """Official names; the average begins at them; other classes need a word."""
    source = build_classifier("tiny", 7)
    state = {to_official(name): value for name, value in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "imagenet.pth")
    weights = ("MODEL.WEIGHTS", tmp_path / "imagenet.pth", "SOLVER.EPOCHS", 2)
    with pytest.raises(WeightsError, match=r"head.weight is \[7, 128\], must be \[5, 128\]"):
        train(arguments(*weights))
    # So slow a training that the average must still be where it began.
    slow = ("SOLVER.BASE_LR", 1e-9, "SOLVER.MIN_LR", 0.0, "SOLVER.WARMUP_LR", 0.0)
    train(arguments(*weights, *slow, "MODEL.WEIGHTS_SKIP", "('head.',)"))
    kept = read_checkpoint(tmp_path / LAST)["state_dict"]
    for name in ("stem.conv1.conv.weight", "stages.3.blocks.0.mlp.fc1.weight"):
        torch.testing.assert_close(kept[name], source.state_dict()[name])


@pytest.mark.usefixtures("narrow")
def test_bad_starts_are_named(arguments, tmp_path):
    with pytest.raises(ValueError, match="multiple of 2 x 1 processes x 1 SOLVER.ACC.*got 7"):
        train(arguments("SOLVER.IMS_PER_BATCH", 7))
    with pytest.raises(ValueError, match="multiple of 1 processes x 3 SOLVER.ACCUMULATION_STEPS"):
        train(arguments("SOLVER.ACCUMULATION_STEPS", 3))
    with pytest.raises(ValueError, match="NUM_CLASSES must be 5, .*got 6"):
        train(arguments("MODEL.NUM_CLASSES", 6))
    with pytest.raises(FileNotFoundError, match="DATASETS.ROOT: no folder .*datasets/README.md"):
        train(arguments("DATASETS.ROOT", tmp_path))
    with pytest.raises(ValueError, match="testing needs weights: give MODEL.WEIGHTS"):
        evaluate(arguments())


@pytest.mark.usefixtures("narrow")
def test_broken_images_are_skipped_and_counted(arguments, tmp_path, pictures, caplog):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    broken = [root / f"{split}/star/000001.jpg" for split in ("train", "val")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="star/000001.jpg cannot be decoded"):
        train(arguments("DATASETS.ROOT", root))
    train(arguments("DATASETS.ROOT", root, "DATASETS.ON_ERROR", "skip"))
    content = json.loads((tmp_path / "output/scores_val.json").read_text())
    assert content["skipped_images"] == 1
    for kind, path in zip(("sample", "image"), broken, strict=True):
        assert f"skipped broken {kind} no. 1: image file {path}" in caplog.text


def run_tool(root, words, processes=1):
    command = [sys.executable, root / "tools/train_cls.py", "--config-file",
               root / "configs/demo_spatial_mamba_t.yaml",
               "--num-gpus", processes, *words]  # fmt: skip
    done = subprocess.run([*map(str, command)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_two_processes_train_and_count_as_one(root, overrides, tmp_path):
    """Without what differs by process (mixing, batch statistics): the same losses and scores."""
    words = [*overrides, "SOLVER.EPOCHS", "2", "MODEL.SPATIAL_MAMBA.BN", "frozen",
             "INPUT.MIXING.MIXUP", "0.0", "INPUT.MIXING.CUTMIX", "0.0", "SOLVER.BASE_LR", "0.0064",
             "MODEL.SPATIAL_MAMBA.DROP_PATH_RATE", "0.0"]  # fmt: skip
    scores, weights = {}, {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run_tool(root, [*words, "OUTPUT_DIR", str(folder)], processes)
        scores[processes] = json.loads((folder / "scores_val.json").read_text())["top1"]
        weights[processes] = read_checkpoint(folder / "last.ckpt")["training_model"]
    assert scores[1] == pytest.approx(scores[2])
    for name, value in weights[1].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[2][name], value, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_training_resumes(root, overrides, tmp_path):
    words = [*overrides, "SOLVER.EPOCHS", "100"]
    command = [sys.executable, str(root / "tools/train_cls.py")]
    last = tmp_path / LAST
    process = subprocess.Popen(
        [*command, *words], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    step = read_checkpoint(last)["global_step"]
    assert step >= 3
    epochs = step // 3 + 1
    done = run_tool(root, ["--resume", *words, "SOLVER.EPOCHS", str(epochs)])
    assert f"resuming from {last}" in done.stdout
    assert read_checkpoint(last)["global_step"] == 3 * epochs
