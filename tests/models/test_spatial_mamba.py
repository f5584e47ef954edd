"""The model against the authors' values, and its promises about shapes, modes and memory."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from spatial_mamba_d2.models import (
    VARIANTS,
    build_backbone,
    build_classifier,
    load_weights,
    optimize_for_inference,
)
from spatial_mamba_d2.models.checkpoints.names import to_official

SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1)}  # a model for tests of behaviour


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def golden_backbone(official_state):
    model = build_backbone("tiny", drop_path_rate=0.0)
    load_weights(model, official_state("backbone_tiny"))
    return model.eval()


@pytest.fixture
def small_backbone():
    torch.manual_seed(0)
    return build_backbone("tiny", drop_path_rate=0.0, **SMALL).eval()


@pytest.mark.parametrize("shape", [(1, 3, 96, 128), (2, 3, 64, 64), (1, 3, 75, 101)], ids=str)
def test_backbone_equals_the_authors(shape, golden_backbone, golden, noise):
    expected = golden("backbone_tiny.npz")
    with torch.no_grad():
        outputs = golden_backbone(noise("input", shape))
    for i, output in enumerate(outputs.values()):
        assert relative_error(output, expected[f"x{shape[2]}x{shape[3]}_out{i}"]) < 1e-4


@pytest.mark.parametrize("shape", [(1, 3, 96, 128), (2, 3, 64, 64), (1, 3, 224, 224)], ids=str)
def test_classifier_equals_the_authors(shape, official_state, golden, noise):
    model = build_classifier("tiny").eval()
    load_weights(model, {"model": official_state("tiny")})
    with torch.no_grad():
        logits = model(noise("input", shape))
    expected = golden("logits_tiny.npz")[f"x{shape[2]}x{shape[3]}_logits"]
    assert relative_error(logits, expected) < 1e-4


def test_training_step_equals_the_authors(golden_backbone, golden, noise):
    """Outputs, all gradients and the batch-norm statistics of one step in train mode."""
    model = copy.deepcopy(golden_backbone).train()
    expected = golden("grad_tiny.json")
    x = noise("input", (2, 3, 64, 64)).requires_grad_()
    outputs = list(model(x).values())
    for i, output in enumerate(outputs):
        assert relative_error(output, golden("train_out_tiny.npz")[f"out{i}"]) < 1e-4
    loss = sum((out * noise(f"loss{i}", out.shape)).sum() for i, out in enumerate(outputs))
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss_fp64"], rel=1e-4)

    def check(name, gradient, reference):
        assert gradient.norm().item() == pytest.approx(reference["norm"], rel=1e-3), name
        values = torch.tensor(reference["value"])
        picked = gradient.flatten()[reference["index"]]
        assert (picked - values).abs().max() <= 1e-3 * values.abs().max(), name

    first_row = expected["input_grad"]["value_first_row"]
    check("input", x.grad, {**expected["input_grad"], "index": list(range(len(first_row))),
                            "value": first_row})  # fmt: skip
    parameters = {to_official(name): p for name, p in model.named_parameters()}
    assert parameters.keys() == expected["grad"].keys()
    for name, parameter in parameters.items():
        if name not in expected["zero_grad"]:
            check(name, parameter.grad, expected["grad"][name])
    buffers = {to_official(name): b for name, b in model.named_buffers()}
    for name, statistics in expected["bn_after_one_step"].items():
        first4 = torch.tensor(statistics["first4"])
        torch.testing.assert_close(buffers[name].flatten()[:4], first4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_the_classifiers(variant, golden):
    official = golden(f"official_keys_{variant}.json")
    model = build_classifier(variant)
    assert sum(p.numel() for p in model.parameters()) == official["params"]
    names = {to_official(name): list(t.shape) for name, t in model.state_dict().items()}
    assert names == official["keys"]


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (5, 3), (33, 64), (64, 95)], ids=str)
def test_any_size(size, small_backbone):
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        outputs = small_backbone(x)
    promised = small_backbone.output_shape()
    assert outputs.keys() == promised.keys()
    for name, (channels, stride) in promised.items():
        height, width = (-(-n // stride) for n in size)
        assert outputs[name].shape == (2, channels, height, width)
        assert outputs[name].isfinite().all()
        assert outputs[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 0, 64)], ids=str)
def test_bad_input_is_named(shape, small_backbone):
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\] with H, W >= 1, got \["):
        small_backbone(torch.randn(shape))


def test_train_and_eval_compute_the_same_function(small_backbone):
    x = torch.randn(2, 3, 40, 56)
    in_eval = small_backbone(x)
    small_backbone.train()
    for module in small_backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the one difference there may be
    in_train = small_backbone(x)
    for name in in_eval:
        torch.testing.assert_close(in_train[name], in_eval[name], rtol=0, atol=1e-6)


def test_eval_is_never_stale(small_backbone):
    """eval, optimizer step, eval again: as a fresh model with the same weights."""
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        first = small_backbone(x)["res5"]
    optimizer = torch.optim.SGD(small_backbone.parameters(), lr=0.1)
    small_backbone(x)["res5"].square().sum().backward()  # also: backward in eval mode
    assert all(p.grad is not None for n, p in small_backbone.named_parameters() if "fusion" in n)
    optimizer.step()
    fresh = build_backbone("tiny", **SMALL).eval()
    fresh.load_state_dict(small_backbone.state_dict())
    with torch.no_grad():
        second, expected = small_backbone(x)["res5"], fresh(x)["res5"]
    assert torch.equal(second, expected)
    assert not torch.allclose(first, second)


def test_gradient_checkpointing_changes_memory_only(small_backbone):
    checkpointed = build_backbone("tiny", drop_path_rate=0.0, grad_checkpointing=True, **SMALL)
    checkpointed.load_state_dict(small_backbone.state_dict())
    x = torch.randn(2, 3, 48, 48)
    kept = []
    for model in (small_backbone.train(), checkpointed.train()):
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = sum(out.square().mean() for out in model(x).values())
        loss.backward()
        kept.append(saved)
    for (name, p), q in zip(
        small_backbone.named_parameters(), checkpointed.parameters(), strict=True
    ):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert kept[1] < 0.8 * kept[0]


def test_drop_path_is_linear_and_off_in_eval():
    model = build_backbone("tiny", embed_dim=16)
    rates = [b.drop_path1.drop_prob for stage in model.stages for b in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)
    x = torch.randn(1, 3, 32, 32)
    model.eval()
    assert torch.equal(model(x)["res5"], model(x)["res5"])


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_frozen_batch_norm(small_backbone):
    model = build_backbone("tiny", bn_policy="frozen", drop_path_rate=0.0, **SMALL)
    assert model.state_dict().keys() == small_backbone.state_dict().keys()
    model.load_state_dict(small_backbone.state_dict())
    x = torch.randn(2, 3, 32, 32)
    expected = small_backbone(x)["res5"]
    model.train()
    before = [bn.running_mean.clone() for bn in batch_norms(model)]
    torch.testing.assert_close(model(x)["res5"], expected, rtol=0, atol=1e-6)
    for bn, mean in zip(batch_norms(model), before, strict=True):
        assert torch.equal(bn.running_mean, mean)
        assert not bn.weight.requires_grad and not bn.training


def test_sync_batch_norm():
    model = build_backbone("tiny", bn_policy="sync", **SMALL)
    assert all(isinstance(bn, nn.SyncBatchNorm) for bn in batch_norms(model))
    assert model.state_dict().keys() == build_backbone("tiny", **SMALL).state_dict().keys()


def test_freeze_at():
    model = build_backbone("tiny", freeze_at=2, **SMALL).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith(("stem.", "stages.0."))
    }
    assert not any(bn.training for bn in batch_norms(model.stem))
    assert all(bn.training for bn in batch_norms(model.stages[1]))


@pytest.mark.parametrize("arguments", [{"bn_policy": "frozen"}, {"freeze_at": 2}], ids=str)
def test_fixed_norms_stay_fixed_when_they_are_replaced(arguments):
    """As trainers do with ``sync_batchnorm=True``."""
    model = build_backbone("tiny", **arguments, **SMALL).train()
    before = [bn.training for bn in batch_norms(model)]
    holder = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(model)).train()
    assert all(isinstance(bn, nn.SyncBatchNorm) for bn in batch_norms(holder))
    assert [bn.training for bn in batch_norms(holder)] == before and not all(before)
    assert not any(bn.weight.requires_grad for bn in batch_norms(model.stem))


@pytest.mark.parametrize("features", [("res2",), ("res4", "res3")], ids=str)
def test_out_features_build_only_what_they_need(features):
    """DDP refuses parameters without a gradient."""
    model = build_backbone("tiny", out_features=features, **SMALL)
    outputs = model(torch.randn(2, 3, 32, 32))
    assert list(outputs) == list(model.output_norms) == sorted(features)
    assert model.output_shape().keys() == outputs.keys()
    sum(output.pow(3).sum() for output in outputs.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    complete = build_backbone("tiny", **SMALL)
    report = load_weights(model, complete.state_dict())
    assert not report.new and len(report.loaded) == len(model.state_dict())
    assert all(name.startswith(("stages.", "output_norms.")) for name in report.ignored)


@pytest.mark.parametrize("optimize", [False, True])
def test_images_of_another_type_are_named(optimize, small_backbone):
    model = optimize_for_inference(small_backbone) if optimize else small_backbone
    x = torch.zeros(1, 3, 32, 32)
    wrong = {
        "x must be floating point, normalised as in training, got torch.uint8": x.byte(),
        "x must be in the model's dtype torch.float32, got torch.float64": x.double(),
        r"x must be \[B, 3, H, W\] with H, W >= 1, got \[1, 1, 3, 32, 32\]": x[None],
        r"x must be \[B, 3, H, W\] with H, W >= 1, got \[1, 4, 32, 32\]": torch.zeros(1, 4, 32, 32),
    }
    for message, images in wrong.items():
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x.bfloat16())["res5"].isfinite().all()
        with pytest.raises(ValueError, match="got torch.float64"):
            model(x.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_states_in_float32(dtype, small_backbone):
    x = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = small_backbone(x)["res5"]
        with torch.autocast("cpu", dtype):
            actual = small_backbone(x)["res5"]
    assert relative_error(actual.float(), expected) < 0.05
    assert small_backbone.stages[0].blocks[0].ssm.A_log.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (1, 2, 3)}, "depths must be four positive numbers, got"),
        ({"bn_policy": "on"}, "bn_policy must be one of train, frozen, sync, got 'on'"),
        ({"freeze_at": 6}, r"freeze_at must be 0\.\.5, got 6"),
        ({"out_features": ("res6",)}, "out_features must be some of res2, res3, res4, res5, got"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_backbone("tiny", **arguments)


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match="variant must be one of tiny, small, base, got 'large'"):
        build_backbone("large")


@pytest.mark.slow
def test_memory_at_detection_size():
    """An 800 x 1333 image through tiny, forward, stays under 3 GB, the interpreter included."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    # Not getrusage: a child's ru_maxrss begins at what the tests before it had taken.
    program = (
        "import torch\n"
        "from spatial_mamba_d2.models import build_backbone\n"
        "with torch.no_grad(): build_backbone('tiny').eval()(torch.randn(1, 3, 800, 1333))\n"
        f"print(open({str(status)!r}).read())\n"
    )
    lines = subprocess.check_output([sys.executable, "-c", program], text=True).splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    in_bytes = int(peak) * 1024
    assert in_bytes < 3e9
