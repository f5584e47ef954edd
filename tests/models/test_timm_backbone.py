"""Backbones of timm with our interface: levels, weights, and what is refused."""

from __future__ import annotations

from collections import ChainMap

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from spatial_mamba_d2.models import build_upernet, load_weights, optimize_for_inference
from spatial_mamba_d2.models.checkpoints.reading import WeightsError
from spatial_mamba_d2.models.param_groups import parameter_groups
from spatial_mamba_d2.models.timm_backbone import TimmBackbone

# timm's own test models, and one with windows of a fixed size
CONVNEXT, RESNET, EFFICIENTNET, SWIN = (
    "timm/test_convnext",
    "timm/test_resnet",
    "timm/test_efficientnet",
    "timm/swin_tiny_patch4_window7_224",
)
ENTRYPOINTS = timm.models._registry._model_entrypoints
HEADS = {"channels": 8, "aux_channels": 8}


def upernet(name=CONVNEXT, **options):
    torch.manual_seed(0)
    return build_upernet(name, 5, **HEADS, **options)


@pytest.fixture(scope="module")
def swin():
    return upernet(SWIN)


@pytest.mark.parametrize("name", [CONVNEXT, RESNET, EFFICIENTNET, SWIN])
@pytest.mark.parametrize("size", [(64, 96), (37, 70)], ids=str)
def test_levels_and_gradients(name, size, swin):
    backbone = swin.backbone if name == SWIN else TimmBackbone(name)
    levels = backbone(torch.randn(2, 3, *size))
    for (level, x), dim, stride in zip(levels.items(), backbone.dims, (4, 8, 16, 32), strict=True):
        assert level == f"res{stride.bit_length() - 1}"
        assert x.shape == (2, dim, *(-(-side // stride) for side in size))
    sum(x.square().sum() for x in levels.values()).backward()
    # No parameter is left that a distributed training would wait for
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    assert backbone.removed and not backbone.removed & set(backbone.body.state_dict())


def test_levels_are_the_feature_maps_of_timm():
    backbone = TimmBackbone(RESNET).eval()
    body = timm.create_model("test_resnet", features_only=True).eval()
    body.load_state_dict(backbone.body.state_dict())
    x = torch.randn(1, 3, 64, 96)
    expected = [f for f, stride in zip(body(x), body.feature_info.reduction(), strict=True)
                if stride >= 4]  # fmt: skip
    for level, feature, norm in zip(
        backbone(x).values(), expected, backbone.output_norms.values(), strict=True
    ):
        torch.testing.assert_close(level, norm(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/convnext_tiney", "nearest one is timm/convnext_tiny"),
        ("timm/convnext_tiny.nope", "list_pretrained.., got 'timm/convnext_tiny.nope'"),
        ("timm/spatial_mamba_tiny", "must be a model of others"),
        ("timm/vit_tiny_patch16_224", "must take images of any size, here 64 x 96: "),
        ("timm/xcit_nano_12_p8_224", "32; it has none of 4, 16, 32, only of 8"),
        ("timm/plain", "must have forward_intermediates"),
    ],
)
def test_models_without_these_levels_are_refused(name, message, monkeypatch):
    plain = {"plain": lambda **kwargs: nn.Conv2d(3, 8, 3)}
    monkeypatch.setattr(timm.models._registry, "_model_entrypoints", ChainMap(plain, ENTRYPOINTS))
    with pytest.raises(ValueError, match=message):
        TimmBackbone(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_at": 2}, "freeze_at must be 0 for timm/test_convnext, got 2"),
        ({"bn_policy": "on"}, "bn_policy must be one of train, frozen, sync, got 'on'"),
    ],
)
def test_options_that_timm_does_not_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        upernet(**options)
    with pytest.raises(
        ValueError, match=r"drop_path_rate .* must be None for timm/dla46_c, got 0.1"
    ):
        TimmBackbone("timm/dla46_c", drop_path_rate=0.1)


def test_policies_of_batch_norms():
    frozen = upernet(RESNET, bn_policy="frozen").train()
    norms = [m for m in frozen.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert frozen.decode_head.fuse.bn.training
    sync = upernet(EFFICIENTNET, bn_policy="sync")
    norms = [m for m in sync.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    acts = [m for m in upernet(EFFICIENTNET).modules() if isinstance(m, BatchNormAct2d)]
    assert len(acts) == sum(hasattr(norm, "act") for norm in norms)  # these keep their activations


def test_checkpointed_gradients_are_the_same():
    x, gradients = torch.randn(2, 3, 64, 64), []
    for on in (False, True):
        model = upernet(grad_checkpointing=on).eval()
        model(x).square().mean().backward()
        gradients.append(model.backbone.body.stem[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_weight_decay_follows_the_recipe_and_timm(swin):
    names = {id(p): n for n, p in swin.named_parameters()}
    decaying, others = ({names[id(p)] for p in g["params"]} for g in parameter_groups(swin, 0.1))
    assert decaying | others == set(names.values())
    assert (
        {n for n in others if "norm" not in n}
        == {n for n in names.values() if "relative_position_bias_table" in n}
        != set()
    )


@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
def test_a_classifier_of_timm_initialises_the_backbone(prefix, tmp_path):
    classifier = timm.create_model("test_convnext", num_classes=7)
    state = {prefix + name: value for name, value in classifier.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "classifier.pth")
    model = upernet()
    report = load_weights(model, tmp_path / "classifier.pth")
    body = model.backbone.body.state_dict()
    assert len(report.loaded) == len(body) and set(report.ignored) == model.backbone.removed
    assert all(torch.equal(value, classifier.state_dict()[name]) for name, value in body.items())
    with pytest.raises(WeightsError, match="must hold all parameters of UPerNet"):
        load_weights(model, tmp_path / "classifier.pth", partial=False)


def test_images_of_other_channels_start_from_rgb():
    classifier = timm.create_model("test_convnext")
    model = upernet(in_chans=1)
    report = load_weights(model, classifier.state_dict())
    assert report.inflated == "backbone.body.stem.0.weight"
    expected = classifier.stem[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.backbone.body.stem[0].weight, expected)


def test_swin_in_the_form_of_its_authors(swin):
    """With buffers, and with each downsampling in the stage before, as timm converts it."""
    classifier = timm.create_model(SWIN.removeprefix("timm/"))
    state = {}
    for name, value in classifier.state_dict().items():
        stage = name.split(".")[1]
        if "downsample" in name:
            name = name.replace(f"layers.{stage}.", f"layers.{int(stage) - 1}.")
        state[name.replace("head.fc.", "head.")] = value
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    load_weights(swin, {"model": state})
    expected = classifier.layers[1].downsample.reduction.weight
    assert torch.equal(swin.backbone.body.layers[1].downsample.reduction.weight, expected)


def test_complete_checkpoints_are_strict():
    source = upernet().eval()
    model = build_upernet(CONVNEXT, 5, **HEADS).eval()
    state = source.state_dict()
    report = load_weights(model, {f"module.{k}": v for k, v in state.items()}, partial=False)
    assert len(report.loaded) == len(state)
    x = torch.randn(1, 3, 33, 50)
    with torch.no_grad():
        assert torch.equal(model(x), source(x))
    missing = {k: v for k, v in state.items() if k != "decode_head.classify.bias"}
    with pytest.raises(WeightsError, match=r"missing from the file \(1\): decode_head.classify"):
        load_weights(model, missing)
    with pytest.raises(WeightsError, match=r"unknown to the model \(1\): ema"):
        load_weights(model, {**state, "ema.decay": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"MODEL.WEIGHTS_SKIP \"\('decode_head.classify',"):
        load_weights(build_upernet(CONVNEXT, 7, **HEADS), state)


def test_checkpoints_of_other_models_are_refused():
    before = upernet(RESNET)
    model = upernet(RESNET)
    with pytest.raises(WeightsError, match="missing from the file"):
        load_weights(model, timm.create_model("test_convnext").state_dict())
    with pytest.raises(WeightsError, match="missing from the file"):
        load_weights(model, build_upernet("tiny", 5, **HEADS).state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


def test_heads_are_optimised_for_inference():
    model = upernet().eval()
    x = torch.randn(1, 3, 70, 50)
    with torch.no_grad():
        torch.testing.assert_close(optimize_for_inference(model)(x), model(x), rtol=1e-4, atol=1e-4)
