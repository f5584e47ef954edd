"""Training, resuming and testing through the functions that the command lines call."""

from __future__ import annotations

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
import torch

from spatial_mamba_d2.data.ade20k import Classes, read_label
from spatial_mamba_d2.data.segmentation_transforms import IGNORE
from spatial_mamba_d2.models import build_classifier, build_upernet, load_weights
from spatial_mamba_d2.models.checkpoints.loading import WeightsError, read_checkpoint, to_official
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.module import (
    Segmentor,
    cross_entropy,
    learning_rate_factor,
)
from spatial_mamba_d2.segmentation.train import build_data, train
from spatial_mamba_d2.segmentation.train import test as evaluate
from spatial_mamba_d2.training import fit as launch
from spatial_mamba_d2.training.checkpoint import SafeCheckpointIO


def curve(folder, key="loss"):
    """``{iteration: value}`` of the metrics file; a repeated iteration keeps its last value."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line[key] for line in lines if key in line}


def scores_of(folder, name="ss_whole"):
    return json.loads((folder / f"scores_{name}.json").read_text())


def test_optimizer_groups_equal_the_official_ones(root, golden):
    cfg = load_config(root / "configs/upernet_spatial_mamba_t.yaml", ["MODEL.DEVICE", "cpu"])
    names = tuple(map(str, range(150)))
    segmentor = Segmentor(cfg, Classes(names, ((0, 0, 0),) * 150))
    configured = segmentor.configure_optimizers()
    official = golden("optim_groups_tiny.json")["upernet"]
    names_of = {id(p): to_official(name) for name, p in segmentor.model.named_parameters()}
    no_decay = set()
    for group in configured["optimizer"].param_groups:
        assert group["initial_lr"] == official["lr"]
        assert list(group["betas"]) == official["betas"]
        if group["weight_decay"] == 0:
            no_decay |= {names_of[id(p)] for p in group["params"]}
        else:
            assert group["weight_decay"] == official["weight_decay"]
            assert len(group["params"]) == official["n_decay"]
    assert no_decay == set(official["no_decay"])
    assert not cfg.SOLVER.CLIP_GRADIENTS.ENABLED and official["clip_grad"] is None


def test_learning_rate_of_the_recipe():
    """Each iteration's, against mmengine's recursions for LinearLR and PolyLR."""
    warmup, last = 1500, 160_000
    factors = [learning_rate_factor(i, warmup, 1e-6, last) for i in range(last)]
    value, expected = 1e-6, []
    for i in range(warmup):
        expected.append(value)
        rise = (1 - 1e-6) / (warmup - 1)
        value *= 1 + rise / (1e-6 + rise * i)
    assert factors[:warmup] == pytest.approx(expected, rel=1e-6)
    total, value = last - warmup - 1, 1.0
    for i in range(warmup, last):
        assert factors[i] == pytest.approx(value, abs=1e-9)
        value *= 1 - 1 / max(total - (i - warmup), 1)
    assert factors[warmup] == 1 and factors[-1] == 0
    assert learning_rate_factor(0, 0, 1e-6, 1) == 1  # the shortest training


def test_loss_is_the_mean_over_all_pixels():
    logits = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    target = torch.randint(0, 5, (2, 12, 16))
    target[0, :6] = IGNORE
    resized = torch.nn.functional.interpolate(logits, (12, 16), mode="bilinear")
    losses = -resized.log_softmax(1).gather(1, target.clamp(max=4)[:, None])[:, 0]
    expected = losses[target != IGNORE].sum() / target.numel()
    torch.testing.assert_close(cross_entropy(logits, target.to(torch.uint8)), expected)
    weights = torch.rand(5, dtype=torch.float64)
    weighted = losses * weights[target.clamp(max=4)] * (target != IGNORE)
    actual = cross_entropy(logits, target.to(torch.uint8), weights)
    torch.testing.assert_close(actual, weighted.mean())
    nothing = torch.full_like(target, IGNORE, dtype=torch.uint8)
    assert cross_entropy(logits, nothing) == 0


class Interrupted(RuntimeError):
    pass


def interrupt_at(monkeypatch, iteration):
    step = Segmentor.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == iteration:
            raise Interrupted
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Segmentor, "training_step", interrupted)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "more",
    [(), ("SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.EMA_DECAY", 0.9, "TEST.EVAL_PERIOD", 2)],
    ids=["plain", "accumulation, average, evaluation"],
)
def test_resume_continues_the_same_curve(more, arguments, tmp_path, monkeypatch):
    """With crops, flips, colours, drop path and dropout; interrupted after the checkpoint."""
    whole = train(arguments(*more, "OUTPUT_DIR", tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            train(arguments(*more))
    assert read_checkpoint(tmp_path / "output/last.ckpt")["global_step"] == 3
    torch.rand(7)  # whatever the generators' state
    resumed = train(arguments(*more, resume=True))
    expected = curve(tmp_path / "whole")
    assert list(expected) == list(range(6))
    assert curve(tmp_path / "output") == pytest.approx(expected, rel=1e-6)
    assert resumed == pytest.approx(whole, rel=1e-6)
    contents = [read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "output")]
    for key in ("state_dict", "training_model"):
        for name, value in contents[0].get(key, {}).items():
            torch.testing.assert_close(contents[1][key][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("narrow")
def test_finished_training_resumes_to_its_evaluation(arguments, tmp_path):
    first = train(arguments("SOLVER.CHECKPOINT_PERIOD", 4))
    assert read_checkpoint(tmp_path / "output/last.ckpt")["global_step"] == 6
    assert train(arguments("SOLVER.CHECKPOINT_PERIOD", 4, resume=True)) == first


@pytest.mark.usefixtures("narrow")
def test_accumulation_sees_the_same_images(arguments):
    """Pixel for pixel, in as many parts."""
    cfg = launch.start(arguments(), load_config)
    batches = {}
    for parts in (1, 2):
        cfg.defrost()
        cfg.SOLVER.ACCUMULATION_STEPS = parts
        data = build_data(cfg)
        data.setup("fit")
        batches[parts] = [
            torch.cat(tensors) for tensors in zip(*data.train_dataloader(), strict=True)
        ]
        assert len(data.train_dataloader()) == 6 * parts
    for whole, in_parts in zip(batches[1], batches[2], strict=True):
        assert torch.equal(whole, in_parts)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_on_the_cpu(precision, arguments, tmp_path):
    scores = train(
        arguments("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision,
                  "SOLVER.CLIP_GRADIENTS.ENABLED", True)
    )  # fmt: skip
    assert all(map(math.isfinite, (*scores.values(), *curve(tmp_path / "output").values())))
    content = read_checkpoint(tmp_path / "output/last.ckpt")
    assert ("MixedPrecision" in content) == (precision == "float16")  # the scaler's state
    assert all(v.dtype != torch.bfloat16 for v in content["state_dict"].values())


@pytest.mark.usefixtures("narrow")
def test_weightless_classes_do_not_train(arguments, tmp_path):
    train(arguments("MODEL.CLASS_WEIGHTS", "(0, 0, 0, 0, 0, 0)", "SOLVER.MAX_ITER", 1))
    assert curve(tmp_path / "output") == {0: 0.0}


@pytest.mark.usefixtures("narrow")
def test_average_is_evaluated_and_saved(arguments, tmp_path):
    decay = 0.5
    averages, raw, initial = [], [], []
    step = Segmentor.optimizer_step

    def record(self, *args, **kwargs):
        initial.append(self.model.decode_head.classify.bias.detach().clone())
        step(self, *args, **kwargs)
        raw.append(self.model.decode_head.classify.bias.detach().clone())
        averages.append(self.average.module.decode_head.classify.bias.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmentor, "optimizer_step", record)
        scores = train(arguments("SOLVER.EMA_DECAY", decay, "TEST.EVAL_PERIOD", 3))
    expected = initial[0]
    for now, average in zip(raw, averages, strict=True):
        expected = decay * expected + (1 - decay) * now
        torch.testing.assert_close(average, expected)
    content = read_checkpoint(tmp_path / "output/last.ckpt")
    assert torch.equal(content["state_dict"]["decode_head.classify.bias"], averages[-1])
    assert torch.equal(content["training_model"]["decode_head.classify.bias"], raw[-1])
    last = ("MODEL.WEIGHTS", tmp_path / "output/last.ckpt", "OUTPUT_DIR", tmp_path / "tested")
    assert evaluate(arguments(*last)) == pytest.approx(scores)


@pytest.mark.usefixtures("narrow")
def test_train_then_test(arguments, tmp_path, caplog):
    """Best and last checkpoint, pictures, logs; single- and multi-scale scores and their tables."""
    output = tmp_path / "output"
    trained = train(arguments("TEST.EVAL_PERIOD", 2, "TEST.PICTURES", 3))
    assert len(list((output / "pictures").glob("*.png"))) == 3
    assert list(output.glob("tensorboard/events.out.tfevents*"))
    evaluations = curve(output, "mIoU")
    assert list(evaluations) == [1, 3, 5]
    best, last = (read_checkpoint(output / f"{name}.ckpt") for name in ("best", "last"))
    assert last["global_step"] == 6
    best_step = max(evaluations, key=lambda step: (evaluations[step], -step)) + 1
    assert best["global_step"] == best_step
    assert best["classes"][0] == "background"

    single = evaluate(arguments())  # best.ckpt
    assert single["mIoU"] == pytest.approx(max(evaluations.values()), rel=1e-6)
    weights = ("MODEL.WEIGHTS", output / "last.ckpt")
    assert evaluate(arguments(*weights)) == pytest.approx(trained)
    content = scores_of(output)
    assert content["weights"].endswith("last.ckpt") and content["skipped_images"] == 0
    assert content["protocol"]["scales"] == [1.0] and content["protocol"]["ignored"] == [0]
    assert np.sum(content["confusion"]) > 5 * 64 * 64 * 0.5

    caplog.clear()
    evaluate(arguments(*weights, "TEST.PROTOCOL", "ms", "TEST.MODE", "slide", "TEST.CROP_PX", 48,
                       "TEST.STRIDE_PX", 32))  # fmt: skip
    multi = scores_of(output, "ms_slide")
    assert multi["protocol"]["flip"] and multi["protocol"]["scales"] == [0.75, 1.0, 1.25]
    assert "background" in caplog.text and "crop 48, stride 32" in caplog.text


@pytest.mark.usefixtures("narrow")
def test_starting_weights(arguments, tmp_path):
    """An ImageNet checkpoint under official names fills the backbone; other classes need a word."""
    classifier = build_classifier("tiny")
    state = {to_official(name): value for name, value in classifier.state_dict().items()}
    torch.save({"model": state}, tmp_path / "imagenet.pth")
    train(arguments("MODEL.WEIGHTS", tmp_path / "imagenet.pth", "SOLVER.MAX_ITER", 1))
    segmentor = tmp_path / "output/last.ckpt"
    other = ("MODEL.NUM_CLASSES", 4, "DATASETS.CLASSES", "", "SOLVER.MAX_ITER", 1,
             "MODEL.WEIGHTS", segmentor, "OUTPUT_DIR", tmp_path / "other")  # fmt: skip
    with pytest.raises(WeightsError, match=r"classify.weight is \[6, 16, 1, 1\], must be \[4, 16"):
        train(arguments(*other))
    skip = ("MODEL.WEIGHTS_SKIP", "('decode_head.classify', 'auxiliary_head.classify')")
    with pytest.raises(ValueError, match="label 5, 6 is impossible"):  # the weights were accepted
        train(arguments(*other, *skip))


@pytest.mark.usefixtures("narrow")
def test_testing_needs_a_whole_segmentor(arguments, tmp_path):
    with pytest.raises(ValueError, match="testing needs weights: give MODEL.WEIGHTS, .*best.ckpt"):
        evaluate(arguments())
    with pytest.raises(FileNotFoundError, match="no such file: .*absent.pth"):
        evaluate(arguments("MODEL.WEIGHTS", tmp_path / "absent.pth"))
    torch.save(build_classifier("tiny").state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(ValueError, match="must hold a whole UPerNet:\n(.*\n)+.*decode_head"):
        evaluate(arguments("MODEL.WEIGHTS", tmp_path / "classifier.pth"))


@pytest.mark.usefixtures("narrow")
def test_bad_starts_are_named(arguments):
    with pytest.raises(ValueError, match="multiple of 1 processes x 3 SOLVER.ACCUMULATION_STEPS"):
        train(arguments("SOLVER.ACCUMULATION_STEPS", 3))
    with pytest.raises(ValueError, match="NUM_CLASSES must be 6, .*'objectInfo.txt', got 7"):
        train(arguments("MODEL.NUM_CLASSES", 7))
    args = arguments()
    args.num_machines = 2
    with pytest.raises(ValueError, match="--dist-url must be tcp://HOST:PORT .*got 'auto'"):
        train(args)


@pytest.mark.usefixtures("narrow")
def test_broken_pairs_are_skipped_and_counted(arguments, tmp_path, shapes, caplog):
    """A truncated image that only shows when it is read, in training and in tests."""
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    broken = [root / f"images/{split}/000000000002.jpg" for split in ("training", "validation")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="000000000002.jpg"):
        train(arguments("DATASETS.ROOT", root))
    train(arguments("DATASETS.ROOT", root, "DATASETS.ON_ERROR", "skip"))
    assert scores_of(tmp_path / "output")["skipped_images"] == 1
    for kind, path in zip(("sample", "pair"), broken, strict=True):
        assert f"skipped broken {kind} no. 1: image file {path}" in caplog.text


def run_tool(root, tool, words, processes=1):
    command = [sys.executable, root / "tools" / tool, "--config-file",
               root / "configs/demo_upernet_spatial_mamba_t.yaml",
               "--num-gpus", processes, *words]  # fmt: skip
    done = subprocess.run([*map(str, command)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_two_processes_count_every_image_once(root, overrides, shapes, tmp_path):
    """5 test images in 2 processes, and in 1: one confusion matrix. Training runs in 2 as well."""
    words = [*overrides, "SOLVER.MAX_ITER", "2"]
    run_tool(root, "train_seg.py", words, processes=2)
    output = tmp_path / "output"
    weights = ["MODEL.WEIGHTS", str(output / "last.ckpt")]
    tested = {}
    for processes in (1, 2):
        folder = str(tmp_path / str(processes))
        run_tool(root, "test_seg.py", [*words, *weights, "OUTPUT_DIR", folder], processes)
        tested[processes] = scores_of(tmp_path / str(processes))
    assert tested[1]["confusion"] == tested[2]["confusion"] == scores_of(output)["confusion"]
    labels = (shapes / "annotations/validation").glob("*.png")
    labelled_px = sum(np.count_nonzero(read_label(path)) for path in labels)
    assert np.sum(tested[2]["confusion"]) == labelled_px


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_training_loses_one_period_at_most(root, overrides, tmp_path):
    words = [*overrides, "SOLVER.MAX_ITER", "500", "SOLVER.CHECKPOINT_PERIOD", "1"]
    command = [sys.executable, str(root / "tools/train_seg.py")]
    last = tmp_path / "output/last.ckpt"
    steps = []
    for wait in (2.0, 0.3):
        resume = ["--resume"] if steps else []
        process = subprocess.Popen(
            [*command, *resume, *words], cwd=root,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before = last.stat().st_mtime_ns if steps else 0
        deadline = time.monotonic() + 120
        while not last.exists() or last.stat().st_mtime_ns == before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        steps.append(read_checkpoint(last)["global_step"])
    assert 1 <= steps[0] < steps[1]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_no_kill_leaves_half_a_checkpoint(tmp_path):
    program = (
        "import sys, torch\n"
        "from spatial_mamba_d2.training.checkpoint import SafeCheckpointIO\n"
        "io, step = SafeCheckpointIO(), 0\n"
        "while True:\n"
        "    io.save_checkpoint({'a': torch.full((400_000,), step), 'step': step}, sys.argv[1])\n"
        "    step += 1\n"
    )
    path = tmp_path / "last.ckpt"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)])
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.237)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    content = SafeCheckpointIO().load_checkpoint(path)
    assert (content["a"] == content["step"]).all()


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": build_upernet("tiny").decode_head.classify.state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="last.ckpt .* is truncated"):
        SafeCheckpointIO().load_checkpoint(path)


@pytest.mark.usefixtures("narrow")
def test_our_checkpoint_loads_anywhere(arguments, tmp_path):
    train(arguments("SOLVER.MAX_ITER", 1))
    model = build_upernet("tiny", 6, channels=16, aux_channels=8)
    report = load_weights(model, tmp_path / "output/last.ckpt")
    assert not report.new and not report.ignored
