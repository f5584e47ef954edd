"""The classifier as users of timm meet it."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.models.checkpoints.names import to_official

NARROW = {"embed_dim": 16, "depths": (1, 2, 1, 1), "drop_path_rate": 0.0}
DIMS = (16, 32, 64, 128)


def create(**kwargs):
    return timm.create_model("spatial_mamba_tiny", **{**NARROW, **kwargs})


@pytest.fixture
def image():
    return torch.randn(2, 3, 65, 97, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [None, "the authors' configuration"])
def test_official_logits_through_timm(config, official_state, golden, noise, tmp_path, monkeypatch):
    """From a file as the authors' training writes it, their yacs configuration included."""
    content = {"model": official_state("tiny"), "epoch": 299, "max_accuracy": 83.5}
    if config:
        yacs = pytest.importorskip("yacs.config", reason="yacs, which writes such files, is absent")
        content["config"] = yacs.CfgNode({"MODEL": yacs.CfgNode({"TYPE": "spatialmamba"})})
    path = tmp_path / "spatialmamba_tiny.pth"
    torch.save(content, path)
    model = timm.create_model("spatial_mamba_tiny", checkpoint_path=str(path)).eval()
    expected = golden("logits_tiny.npz")
    for height, width, batch in ((96, 128, 1), (64, 64, 2)):
        with torch.no_grad():
            logits = model(noise("input", (batch, 3, height, width)))
        reference = expected[f"x{height}x{width}_logits"]
        tolerance = 1e-4 * reference.abs().max().item()
        torch.testing.assert_close(logits, reference, rtol=0, atol=tolerance)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    state = build_classifier("tiny", **NARROW).state_dict()
    del state["norm.bias"]
    torch.save(state, tmp_path / "ours.pth")
    with pytest.raises(RuntimeError, match="norm.bias"):
        create(checkpoint_path=str(tmp_path / "ours.pth"))
    with pytest.raises(RuntimeError, match="stages.1.blocks.1"):
        create(depths=(1, 1, 1, 1), checkpoint_path=str(tmp_path / "ours.pth"))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"model": {}, "config": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(Exception, match="open"):
        create(checkpoint_path=str(tmp_path / "bad.pth"))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name", ["spatial_mamba_tiny", "spatial_mamba_small", "spatial_mamba_base"]
)
def test_default_configuration(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.input_size == (3, 224, 224) and cfg.num_classes == 1000
    assert (cfg.crop_pct, cfg.interpolation) == (0.875, "bicubic")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.default_cfg is model.pretrained_cfg
    classifier, first = model.default_cfg["classifier"], model.default_cfg["first_conv"]
    assert model.get_submodule(classifier) is model.get_classifier()
    assert model.get_submodule(first).in_channels == 3
    assert [info["num_chs"] for info in model.feature_info] == model.dims
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]


def test_pretrained_without_a_file_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"pretrained must be False.*checkpoint_path"):
        create(pretrained=True)


@pytest.mark.parametrize("official", [False, True], ids=["ours", "official"])
@pytest.mark.parametrize(
    ("kwargs", "adapted"),
    [
        ({}, ()),
        ({"num_classes": 3}, ("head.",)),
        ({"num_classes": 0}, ("head.",)),
        ({"in_chans": 1}, ("stem.conv1.conv.",)),
        ({"features_only": True, "out_indices": (1, 2)}, ("head.", "norm.", "stages.3.")),
    ],
    ids=["whole", "other classes", "no classes", "grey images", "features"],
)
def test_pretrained_weights_adapt(kwargs, adapted, official, tmp_path):
    source = build_classifier("tiny", num_classes=7, **NARROW).state_dict()
    saved = {to_official(k): v for k, v in source.items()} if official else source
    torch.save(saved, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 7}
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    state = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    same = [name for name in state if not name.startswith(adapted)]
    assert len(same) > 40 and all(torch.equal(state[name], source[name]) for name in same)
    if "in_chans" in kwargs:
        grey = source["stem.conv1.conv.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(state["stem.conv1.conv.weight"], grey)


def test_features_and_head(image):
    model = create(num_classes=5).eval()
    features = model.forward_features(image)
    assert features.shape == (2, 3, 4, DIMS[-1]) and model.output_fmt == "NHWC"
    logits = model.forward_head(features)
    assert logits.shape == (2, 5)
    assert torch.equal(logits, model(image))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.head(pooled), logits)
    assert model.num_features == model.head_hidden_size == pooled.shape[1]


@pytest.mark.parametrize(
    ("pool", "width"), [("avg", 1), ("max", 1), ("avgmax", 1), ("catavgmax", 2), ("", None)]
)
def test_other_classes_and_pooling(pool, width, image):
    model = create(num_classes=5).eval()
    model.reset_classifier(0, pool)
    outputs = model(image)
    assert isinstance(model.get_classifier(), torch.nn.Identity) and model.num_classes == 0
    expected = (2, 3, 4, DIMS[-1]) if width is None else (2, width * DIMS[-1])
    assert outputs.shape == expected
    if width:
        model.reset_classifier(9)
        assert model(image).shape == (2, 9) and model.global_pool.pool_type == pool
        direct = create(num_classes=9, global_pool=pool).eval()
        direct.load_state_dict(model.state_dict())
        assert torch.equal(direct(image), model(image))
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        model.reset_classifier(-1)


def test_intermediates(image):
    model = create(num_classes=5).eval()
    stages = list(model.forward_stages(image).values())
    final, outputs = model.forward_intermediates(image)
    assert torch.equal(final, model.forward_features(image))
    for output, stage, dim in zip(outputs, stages, DIMS, strict=True):
        assert output.shape[1] == dim and torch.equal(output.permute(0, 2, 3, 1), stage)
    last = model.forward_intermediates(
        image, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True
    )
    assert len(last) == 1 and torch.equal(last[0], final)
    final, outputs = model.forward_intermediates(image, indices=[1, -3], stop_early=True)
    assert torch.equal(final, stages[1]) and torch.equal(outputs[0], outputs[1])
    with pytest.raises(ValueError, match="output_fmt must be one of NCHW, NHWC, got 'NLC'"):
        model.forward_intermediates(image, output_fmt="NLC")


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (2,), (0, 2), (-1,)])
def test_features_only(indices, image):
    model = create(features_only=True, out_indices=indices).eval()
    outputs = model(image)
    absolute = [i % 4 for i in indices]
    assert model.feature_info.channels() == [DIMS[i] for i in absolute]
    assert model.feature_info.reduction() == [4 * 2**i for i in absolute]
    for output, i in zip(outputs, absolute, strict=True):
        stride = 4 * 2**i
        assert output.shape == (2, DIMS[i], -(-65 // stride), -(-97 // stride))
    whole = create().eval()
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    whole.load_state_dict({**whole.state_dict(), **state})
    expected = list(whole.forward_stages(image).values())
    for output, i in zip(outputs, absolute, strict=True):
        assert torch.equal(output.permute(0, 2, 3, 1), expected[i])
    if max(absolute) < 3:
        assert not any(name.startswith("stages.3") for name in state)


def test_features_default_to_all_stages(image):
    assert len(create(features_only=True)(image)) == 4


def test_other_image_channels(image):
    assert create(in_chans=5).eval()(torch.randn(1, 5, 32, 32)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"x must be \[B, 5, H, W\]"):
        create(in_chans=5)(image)


def test_drop_rates_reach_the_model():
    model = create(drop_path_rate=0.4, drop_rate=0.25)
    rates = [block.drop_path1.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert model.head_drop.p == 0.25


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_follow_the_forward_pass(coarse):
    """Stem, then blocks (or stages) in order, then the head; every parameter once."""
    model = create()
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    layers = len(model.stages) if coarse else sum(NARROW["depths"])
    # timm puts what no pattern names, the head and (coarse) the norm, behind all.
    assert len(groups) == 1 + layers + 1
    assert all(name.startswith("stem.") for name in groups[0])
    assert "head.weight" in groups[layers + 1]
    if not coarse:
        assert {name.split(".downsample")[0] for name in groups[3] if "down" in name} == {
            "stages.1"
        }
        assert "norm.weight" in groups[layers]


def test_gradient_checkpointing_changes_nothing(image):
    model = create(num_classes=5)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        model.eval()(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_weight_decay_follows_the_official_groups(golden):
    """By timm's optimizer factory; names and number as in the authors' classification."""
    model = timm.create_model("spatial_mamba_tiny")
    assert model.no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    names = {id(p): to_official(name) for name, p in model.named_parameters()}
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    official = golden("optim_groups_tiny.json")["classification"]
    assert {names[id(p)] for p in groups[0.0]} == set(official["no_decay"])
    assert len(groups[0.05]) == official["n_decay"]


def test_training_script_habits(image, tmp_path):
    """create_model, create_optimizer_v2 with layer decay, a step, CheckpointSaver, reading back."""
    torch.manual_seed(0)
    model = create(num_classes=5, drop_path_rate=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.8)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 1 + 5 + 1
    target = torch.tensor([0, 3])
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path))
    best, _ = saver.save_checkpoint(epoch=0, metric=50.0)
    assert best == 50.0
    again = create(num_classes=5, checkpoint_path=str(tmp_path / "model_best.pth.tar"))
    assert torch.equal(again.eval()(image), model.eval()(image))


def test_through_the_hub_format(image, tmp_path):
    """The folder of config.json and safetensors that timm's push_to_hf_hub uploads, kept here."""
    model = create(num_classes=5).eval()
    save_for_hf(model, tmp_path, model_args=NARROW, safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(image), model(image))


def test_copies_and_pickles_still_take_official_names(image):
    model = create(num_classes=5).eval()
    clone = copy.deepcopy(create(num_classes=5)).eval()
    clone.load_state_dict({to_official(k): v for k, v in model.state_dict().items()})
    assert torch.equal(clone(image), model(image))
    wrapped = torch.nn.Sequential(create(num_classes=5).eval())
    wrapped.load_state_dict({f"0.{to_official(k)}": v for k, v in model.state_dict().items()})
    assert torch.equal(wrapped(image), model(image))


def test_importing_the_models_registers_them_and_changes_no_setting_of_pytorch():
    """Only timm's entry points make a stand-in for the authors' configuration known."""
    program = (
        "import torch, timm, spatial_mamba_d2.models\n"
        "def known(): return 'yacs' in str(torch.serialization.get_safe_globals())\n"
        "assert not known()\n"
        "print(*timm.list_models('spatial_mamba*'))\n"
        "print(timm.models.get_arch_name('spatial_mamba_tiny.untrained'))\n"
        "timm.create_model('spatial_mamba_tiny', embed_dim=16, depths=(1, 1, 1, 1))\n"
        "assert known()\n"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.split() == [
        "spatial_mamba_base",
        "spatial_mamba_small",
        "spatial_mamba_tiny",
        "spatial_mamba_tiny",
    ]
