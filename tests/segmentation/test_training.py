"""Training, resuming and testing through the functions that the command lines call."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from argparse import Namespace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from spatial_mamba_d2 import config
from spatial_mamba_d2.data.class_indices import IGNORE
from spatial_mamba_d2.data.label_format import build_label_format
from spatial_mamba_d2.data.label_maps import Classes, read_label
from spatial_mamba_d2.data.shapes import SEMANTIC_NAMES
from spatial_mamba_d2.models import build_classifier, build_upernet, load_weights
from spatial_mamba_d2.models.checkpoints.names import to_official
from spatial_mamba_d2.models.checkpoints.reading import WeightsError, read_checkpoint
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.data import build_data
from spatial_mamba_d2.segmentation.inference import build_protocol
from spatial_mamba_d2.segmentation.losses import balancing_weights, cross_entropy, dice_loss
from spatial_mamba_d2.segmentation.metrics import Confusion
from spatial_mamba_d2.segmentation.module import Segmentor, learning_rate_factor
from spatial_mamba_d2.segmentation.train import run
from spatial_mamba_d2.training.checkpoint import SafeCheckpointIO


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


@pytest.mark.parametrize(
    "more",
    [(), ("SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.EMA_DECAY", 0.9, "TEST.EVAL_PERIOD", 2)],
    ids=["plain", "accumulation, average, evaluation"],
)
def test_resume_continues_the_same_curve(more, arguments, tmp_path, interrupted, curve):
    """With crops, flips, colours, drop path and dropout; interrupted after the checkpoint."""
    whole = run(arguments(*more, "OUTPUT_DIR", tmp_path / "whole"))
    with interrupted(Segmentor, 5):
        run(arguments(*more))
    saved = 4 if more else 3  # also before each evaluation
    assert read_checkpoint(tmp_path / "output/last.ckpt")["global_step"] == saved
    torch.rand(7)  # whatever the generators' state
    resumed = run(arguments(*more, resume=True))
    expected = curve(tmp_path / "whole")
    assert list(expected) == list(range(6))
    assert curve(tmp_path / "output") == pytest.approx(expected, rel=1e-6)
    assert resumed == pytest.approx(whole, rel=1e-6)
    contents = [read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "output")]
    for key in ("state_dict", "training_model"):
        for name, value in contents[0].get(key, {}).items():
            torch.testing.assert_close(contents[1][key][name], value, rtol=1e-5, atol=1e-6)


def test_finished_training_resumes_to_its_evaluation(arguments, tmp_path):
    first = run(arguments("SOLVER.CHECKPOINT_PERIOD", 4))
    assert read_checkpoint(tmp_path / "output/last.ckpt")["global_step"] == 6
    assert run(arguments("SOLVER.CHECKPOINT_PERIOD", 4, resume=True)) == first


def test_accumulation_sees_the_same_images(arguments):
    """Pixel for pixel, in as many micro-batches."""
    batches = {}
    for accumulation_steps in (1, 2):
        words = arguments("SOLVER.ACCUMULATION_STEPS", accumulation_steps).opts
        cfg = load_config(None, words)
        data = build_data(cfg, build_protocol(cfg))
        data.setup("fit")
        micro_batches = islice(data.train_dataloader(), 6 * accumulation_steps)
        batches[accumulation_steps] = [
            torch.cat(tensors) for tensors in zip(*micro_batches, strict=True)
        ]
    for whole, accumulated in zip(batches[1], batches[2], strict=True):
        assert torch.equal(whole, accumulated)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_on_the_cpu(precision, arguments, tmp_path, curve, monkeypatch):
    monkeypatch.setattr(config, "resolve_device", lambda cfg: None)  # which refuses float16
    scores = run(
        arguments("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision,
                  "SOLVER.CLIP_GRADIENTS.ENABLED", True)
    )  # fmt: skip
    assert all(map(math.isfinite, (*scores.values(), *curve(tmp_path / "output").values())))
    content = read_checkpoint(tmp_path / "output/last.ckpt")
    assert ("MixedPrecision" in content) == (precision == "float16")  # the scaler's state
    assert all(v.dtype != torch.bfloat16 for v in content["state_dict"].values())


def test_weightless_classes_do_not_train():
    """Also in a crop that has no others."""
    logits, target = torch.randn(2, 6, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    assert cross_entropy(logits, target, torch.tensor([0.0, 1, 1, 1, 1, 1])) == 0


def test_average_is_evaluated_and_saved(arguments, tmp_path):
    decay = 0.5
    averages, raw, initial = [], [], []
    step = Segmentor.optimizer_step

    def record(self, *args, **kwargs):
        initial.append(self.model.decode_head.classify.bias.detach().clone())
        step(self, *args, **kwargs)
        raw.append(self.model.decode_head.classify.bias.detach().clone())
        averages.append(self.ema.module.decode_head.classify.bias.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmentor, "optimizer_step", record)
        scores = run(arguments("SOLVER.EMA_DECAY", decay, "TEST.EVAL_PERIOD", 3))
    expected = initial[0]
    for now, average in zip(raw, averages, strict=True):
        expected = decay * expected + (1 - decay) * now
        torch.testing.assert_close(average, expected)
    content = read_checkpoint(tmp_path / "output/last.ckpt")
    assert torch.equal(content["state_dict"]["decode_head.classify.bias"], averages[-1])
    assert torch.equal(content["training_model"]["decode_head.classify.bias"], raw[-1])
    last = ("MODEL.WEIGHTS", tmp_path / "output/last.ckpt", "OUTPUT_DIR", tmp_path / "tested")
    assert run(arguments(*last, eval_only=True)) == pytest.approx(scores)


def test_train_then_evaluate(arguments, tmp_path, caplog, curve):
    """Best and last checkpoint, pictures, logs; single- and multi-scale scores and their tables."""
    output = tmp_path / "output"
    trained = run(arguments("TEST.EVAL_PERIOD", 2, "TEST.PICTURES", 3))
    assert len(list((output / "pictures").glob("*.png"))) == 3
    assert list(output.glob("tensorboard/events.out.tfevents*"))
    evaluations = curve(output, "mIoU")
    assert list(evaluations) == [1, 3, 5]
    best, last = (read_checkpoint(output / f"{name}.ckpt") for name in ("best", "last"))
    assert last["global_step"] == 6
    best_step = max(evaluations, key=lambda step: (evaluations[step], -step)) + 1
    assert best["global_step"] == best_step
    assert best["classes"][0] == "background"

    single = run(arguments(eval_only=True))  # best.ckpt
    assert single["mIoU"] == pytest.approx(max(evaluations.values()), rel=1e-6)
    weights = ("MODEL.WEIGHTS", output / "last.ckpt")
    assert run(arguments(*weights, eval_only=True)) == pytest.approx(trained)
    content = scores_of(output)
    assert content["weights"].endswith("last.ckpt") and content["skipped_images"] == 0
    assert content["protocol"]["scales"] == [1.0] and content["protocol"]["ignored"] == [0]
    assert np.sum(content["confusion"]) > 5 * 64 * 64 * 0.5

    caplog.clear()
    run(arguments(*weights, "TEST.PROTOCOL", "ms", "TEST.MODE", "slide", "TEST.CROP_PX", 48,
                       "TEST.STRIDE_PX", 32, eval_only=True))  # fmt: skip
    multi = scores_of(output, "ms_slide")
    assert multi["protocol"]["flip"] and multi["protocol"]["scales"] == [0.75, 1.0, 1.25]
    assert "background" in caplog.text and "crop 48, stride 32" in caplog.text


def test_starting_weights(arguments, tmp_path):
    """An ImageNet checkpoint under official names fills the backbone; other classes need a word."""
    classifier = build_classifier("test")
    state = {to_official(name): value for name, value in classifier.state_dict().items()}
    torch.save({"model": state}, tmp_path / "imagenet.pth")
    run(arguments("MODEL.WEIGHTS", tmp_path / "imagenet.pth", "SOLVER.MAX_ITER", 1))
    segmentor = tmp_path / "output/last.ckpt"
    other = ("MODEL.NUM_CLASSES", 4, "DATASETS.CLASSES", "", "SOLVER.MAX_ITER", 1,
             "MODEL.WEIGHTS", segmentor, "OUTPUT_DIR", tmp_path / "other")  # fmt: skip
    with pytest.raises(WeightsError, match=r"classify.weight is \[6, 16, 1, 1\], must be \[4, 16"):
        run(arguments(*other))
    skip = ("MODEL.WEIGHTS_SKIP", "('decode_head.classify', 'auxiliary_head.classify')")
    with pytest.raises(ValueError, match="label 5, 6 is impossible"):  # the weights were accepted
        run(arguments(*other, *skip))


def test_evaluation_needs_a_complete_segmentor(arguments, tmp_path):
    with pytest.raises(ValueError, match="no weights to evaluate: set MODEL.WEIGHTS .*best.ckpt"):
        run(arguments(eval_only=True))
    with pytest.raises(FileNotFoundError, match="no such file: .*absent.pth"):
        run(arguments("MODEL.WEIGHTS", tmp_path / "absent.pth", eval_only=True))
    torch.save(build_classifier("test").state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(ValueError, match="must hold all parameters of UPerNet(.*\n)+.*decode_head"):
        run(arguments("MODEL.WEIGHTS", tmp_path / "classifier.pth", eval_only=True))


def test_bad_starts_are_named(arguments):
    with pytest.raises(ValueError, match="multiple of 1 processes x 3 SOLVER.ACCUMULATION_STEPS"):
        run(arguments("SOLVER.ACCUMULATION_STEPS", 3))
    with pytest.raises(ValueError, match="NUM_CLASSES must be 6, .*'objectInfo.txt', got 7"):
        run(arguments("MODEL.NUM_CLASSES", 7))
    args = arguments()
    args.num_machines = 2
    with pytest.raises(ValueError, match="--dist-url must be tcp://HOST:PORT .*got 'auto'"):
        run(args)


def test_broken_pairs_are_skipped_and_counted(arguments, tmp_path, shapes, caplog):
    """A truncated image that only shows when it is read, in training and in tests."""
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    broken = [root / f"images/{split}/000000000002.jpg" for split in ("training", "validation")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="000000000002.jpg"):
        run(arguments("DATASETS.ROOT", root))
    run(arguments("DATASETS.ROOT", root, "DATASETS.ON_ERROR", "skip", resume=True))
    assert scores_of(tmp_path / "output")["skipped_images"] == 1
    for kind, path in zip(("sample", "pair"), broken, strict=True):
        assert f"skipped broken {kind} no. 1: image file {path}" in caplog.text


def test_everything_that_is_left_out_is_in_the_scores(arguments, tmp_path, shapes):
    """Of 5 images, 2 are found unusable at the start, and 1 when it is read."""
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    images = sorted((root / "images/validation").iterdir())
    labels = sorted((root / "annotations/validation").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:-300])
    labels[1].unlink()
    labels[1].symlink_to("gone.png")
    Image.new("L", (5, 5), 1).save(labels[2])
    (root / "annotations/validation/extra.png").write_bytes(labels[3].read_bytes())
    run(arguments("DATASETS.ROOT", root, "DATASETS.ON_ERROR", "skip", "SOLVER.MAX_ITER", 1))
    content = scores_of(tmp_path / "output")
    assert (content["images"], content["skipped_images"]) == (2, 3)
    assert content["skipped"] == {
        "label without image": 1,
        "unreadable label file": 1,
        "wrong size": 1,
        "broken when read": 1,
    }
    read = [read_label(path) for path in labels[3:]]
    assert np.sum(content["confusion"]) == sum(np.count_nonzero(label) for label in read)


def test_training_without_a_test_split(arguments, tmp_path):
    no_test = ("DATASETS.TEST", "", "SOLVER.MAX_ITER", 1)
    assert run(arguments(*no_test, "TEST.EVAL_PERIOD", 1)) == {}
    output = tmp_path / "output"
    assert (output / "last.ckpt").is_file() and not (output / "best.ckpt").exists()
    weights = ("MODEL.WEIGHTS", output / "last.ckpt")
    with pytest.raises(ValueError, match="DATASETS.TEST must name a split to evaluate, got ''"):
        run(arguments(*no_test, *weights, eval_only=True))


def test_predicted_labels_are_written_as_they_are_stored(arguments, tmp_path, shapes):
    """The files, read back, have the scores that were reported; no file of the data is replaced."""
    stored, names = (7, 70, 700, 8, 9, 10), SEMANTIC_NAMES
    root, folder = tmp_path / "mapped", tmp_path / "labels"
    shutil.copytree(shapes, root)
    for path in (root / "annotations").rglob("*.png"):
        label = read_label(path)
        Image.fromarray(np.array((3, *stored), np.uint16)[label]).save(path)
    entries = [f"{value}: {name}" for value, name in zip(stored, names, strict=True)]
    (root / "map.txt").write_text("\n".join([*entries, "3: ignore"]))
    words = ("DATASETS.ROOT", root, "DATASETS.LABEL_MAP", "map.txt", "SOLVER.MAX_ITER", 1)
    run(arguments(*words, "TEST.SAVE_LABELS", folder))
    confusion = Confusion(6)
    labels = build_label_format(names, 1, (0,), "map.txt", root)
    truths = sorted((root / "annotations/validation").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in truths]
    for truth in truths:
        prediction, true = (
            torch.from_numpy(labels.to_indices(read_label(path)))
            for path in (folder / truth.name, truth)
        )
        confusion.update(prediction, true)
    assert confusion.matrix.tolist() == scores_of(tmp_path / "output")["confusion"]

    last = ("MODEL.WEIGHTS", tmp_path / "output/last.ckpt")
    labels_before = {path: path.read_bytes() for path in root.rglob("*.png")}
    for split in ("training", "validation"):  # both have files of these names
        unsafe = root / "annotations" / split
        with pytest.raises(ValueError, match="would be written over the input"):
            run(arguments(*words, *last, "TEST.SAVE_LABELS", unsafe, eval_only=True))
    assert labels_before == {path: path.read_bytes() for path in root.rglob("*.png")}


def test_a_checkpoint_with_the_same_classes_in_another_order(arguments, tmp_path, caplog):
    run(arguments("DATASETS.TEST", "", "SOLVER.MAX_ITER", 1))
    names, file = list(SEMANTIC_NAMES), tmp_path / "names.txt"
    words = ("DATASETS.CLASSES", file, "MODEL.WEIGHTS", tmp_path / "output/last.ckpt")
    file.write_text("\n".join([names[1], names[0], *names[2:]]))
    with pytest.raises(ValueError, match="same names in another order: class 0 is"):
        run(arguments(*words, eval_only=True))
    file.write_text("\n".join([*names[:-1], "something else"]))
    run(arguments(*words, eval_only=True))
    assert "names of 1 classes differ: class 5 is" in caplog.text
    # A training that starts from there says so, too.
    start = arguments(
        *words, "DATASETS.TEST", "", "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "b"
    )
    caplog.clear()
    run(start)
    assert "names of 1 classes differ: class 5 is" in caplog.text


def test_frozen_stages_balanced_classes_and_dice(arguments, tmp_path, curve, caplog):
    caplog.set_level(logging.INFO, "spatial_mamba_d2")
    keys = ("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.CLASS_WEIGHTS", "('auto',)",
            "MODEL.DICE_WEIGHT", 0.5, "DATASETS.TEST", "")  # fmt: skip
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        step = Segmentor.optimizer_step

        def record(self, *args, **kwargs):
            steps.append({k: v.detach().clone() for k, v in self.model.named_parameters()})
            step(self, *args, **kwargs)

        patch.setattr(Segmentor, "optimizer_step", record)
        run(arguments(*keys, "SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 0))
    changed = {name for name, value in steps[-1].items() if not torch.equal(value, steps[0][name])}
    frozen = ("backbone.stem", "backbone.stages.0")
    assert not any(name.startswith(frozen) for name in changed)
    assert any(name.startswith("backbone.stages.1") for name in changed)
    (weights,) = re.findall(r"MODEL\.CLASS_WEIGHTS: (.*)", caplog.text)
    background, *others = map(float, weights.split(","))
    assert 0.1 <= background < 0.5 < min(others)  # it fills the images
    decode, auxiliary, dice, loss = (
        curve(tmp_path / "output", key)[0]
        for key in ("loss_decode", "loss_aux", "loss_dice", "loss")
    )
    assert loss == pytest.approx(decode + 0.4 * auxiliary + dice, rel=1e-5)


def test_weights_of_classes_by_their_frequency():
    assert balancing_weights([1000, 10, 4, 0]) == pytest.approx(
        [0.01 ** (1 / 3), 1.0, 2.5 ** (1 / 3), 1.0]
    )
    assert balancing_weights([10**6, 10, 4]) == pytest.approx([0.1, 1.0, 2.5 ** (1 / 3)])


def test_dice_is_that_of_the_definition():
    logits = torch.randn(2, 4, 6, 6)
    target = torch.randint(0, 3, (2, 6, 6)).to(torch.uint8)  # class 3 does not occur
    target[0, :2] = IGNORE
    counted = target != IGNORE
    losses = []
    for k in range(3):
        p, t = logits.softmax(1)[:, k][counted], (target == k)[counted]
        losses.append(1 - 2 * p[t].sum() / (p.sum() + t.sum()))
    torch.testing.assert_close(dice_loss(logits, target), torch.stack(losses).mean())
    # Against one-hot labels, with gradients
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    truth = torch.nn.functional.one_hot(target.where(counted, 0).long(), 4).movedim(-1, 1)
    probabilities, truth = y.softmax(1) * counted[:, None], truth * counted[:, None]
    either = probabilities.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    dice = 2 * (probabilities * truth).sum((0, 2, 3)) / either
    (1 - dice[:3]).mean().backward()
    dice_loss(x, target).backward()
    torch.testing.assert_close(x.grad, y.grad)
    perfect = 50 * torch.nn.functional.one_hot(target.clamp(max=3).long(), 4).movedim(-1, 1)
    assert dice_loss(perfect.float(), target) < 1e-6
    assert dice_loss(logits, torch.full_like(target, IGNORE)) == 0


@pytest.mark.parametrize(
    ("world_size", "bn", "fits"), [(4, "train", False), (2, "train", True), (4, "sync", True)]
)
def test_each_process_needs_two_images(world_size, bn, fits, overrides, monkeypatch):
    cfg = load_config(None, overrides).clone()
    cfg.defrost()
    cfg.MODEL.SPATIAL_MAMBA.BN = bn
    segmentor = Segmentor(cfg, Classes(SEMANTIC_NAMES, ((0, 0, 0),) * 6))
    monkeypatch.setattr(Segmentor, "trainer", Namespace(world_size=world_size))
    if fits:
        segmentor.setup("fit")
    else:
        with pytest.raises(ValueError, match="2 x 4 processes x 1 .*or .*SPATIAL_MAMBA.BN sync"):
            segmentor.setup("fit")


@pytest.mark.slow
def test_two_processes_count_every_image_once(root, arguments, shapes, as_under_torchrun, tmp_path):
    """5 test images in 2 processes, and in 1: one confusion matrix. Training runs in 2 as well."""
    flags = {"config_file": str(root / "configs/demo_upernet_spatial_mamba_t.yaml")}
    as_under_torchrun(run, arguments("SOLVER.MAX_ITER", 2, **flags))
    output = tmp_path / "output"
    words = ["MODEL.WEIGHTS", output / "last.ckpt", "OUTPUT_DIR"]
    flags["eval_only"] = True
    as_under_torchrun(run, arguments(*words, tmp_path / "2", **flags))
    run(arguments(*words, tmp_path / "1", **flags))
    evaluated = {processes: scores_of(tmp_path / str(processes)) for processes in (1, 2)}
    assert evaluated[1]["confusion"] == evaluated[2]["confusion"] == scores_of(output)["confusion"]
    labels = (shapes / "annotations/validation").glob("*.png")
    labelled_px = sum(np.count_nonzero(read_label(path)) for path in labels)
    assert np.sum(evaluated[2]["confusion"]) == labelled_px


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": build_upernet("tiny").decode_head.classify.state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="last.ckpt .* is truncated"):
        SafeCheckpointIO().load_checkpoint(path)


def test_our_checkpoint_loads_anywhere(arguments, tmp_path):
    run(arguments("SOLVER.MAX_ITER", 1))
    model = build_upernet("test", 6, channels=16, aux_channels=8)
    report = load_weights(model, tmp_path / "output/last.ckpt")
    assert not report.new and not report.ignored
