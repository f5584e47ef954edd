"""Recognising, translating and strictly loading checkpoints."""

from __future__ import annotations

import ast
import re

import pytest
import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from spatial_mamba_d2.models import (
    build_backbone,
    build_classifier,
    build_upernet,
    load_weights,
)
from spatial_mamba_d2.models.checkpoints.names import to_official, to_ours
from spatial_mamba_d2.models.checkpoints.reading import WeightsError

SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1)}


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return build_classifier("tiny", num_classes=7, **SMALL)


@pytest.fixture
def official(classifier):
    return {to_official(name): value for name, value in classifier.state_dict().items()}


@pytest.mark.parametrize(
    "model",
    [f"{head}{v}" for head in ("", "maskrcnn_", "upernet_") for v in ("tiny", "small", "base")],
)
def test_names_are_in_bijection(model, golden):
    names = list(golden(f"official_keys_{model}.json")["keys"])
    ours = [to_ours(name, segmentor=model.startswith("upernet")) for name in names]
    assert len(set(ours)) == len(names)
    assert [to_official(name) for name in ours] == names


@pytest.mark.parametrize("wrapper", ["model", "model_ema", "state_dict", None])
def test_official_checkpoints_load_however_wrapped(wrapper, official, classifier, tmp_path):
    path = tmp_path / "official.pth"
    torch.save(official if wrapper is None else {wrapper: official, "epoch": 3}, path)
    model = build_classifier("tiny", num_classes=7, **SMALL)
    report = load_weights(model, path)
    assert len(report.loaded) == len(official) and not report.new and not report.ignored
    for name, value in model.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name])


def test_ours_and_safetensors_and_data_parallel(classifier, tmp_path):
    from safetensors.torch import save_file

    state = classifier.state_dict()
    save_file(state, tmp_path / "ours.safetensors")
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "ours.pth")
    for name in ("ours.safetensors", "ours.pth"):
        model = build_classifier("tiny", num_classes=7, **SMALL)
        load_weights(model, tmp_path / name)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("prefix", "removed"),
    [
        ("_orig_mod.", ["_orig_mod."]),
        ("module.module.", ["module."]),
        ("model.", ["model."]),
        ("net.encoder._orig_mod.", ["net.", "encoder.", "_orig_mod."]),
        ("module.model.", ["model."]),
    ],
)
@pytest.mark.parametrize(
    "wrappers", [(), ("model_state_dict",), ("state_dict_ema",), ("params", "state_dict")], ids=str
)
@pytest.mark.parametrize("names", ["ours", "official"])
def test_what_trainers_put_around_weights(
    prefix, removed, wrappers, names, classifier, official, tmp_path
):
    state = classifier.state_dict() if names == "ours" else official
    content = {prefix + name: value for name, value in state.items()}
    for key in wrappers:
        content = {
            key: content,
            "optimizer": {"state": {}},
            "params": content if key == "params" else {},
        }
    torch.save(content, tmp_path / "checkpoint.pth")
    model = build_classifier("tiny", num_classes=7, **SMALL)
    report = load_weights(model, tmp_path / "checkpoint.pth", partial=False)
    assert not report.new and not report.ignored
    assert [part for part in removed if part not in str(report)] == []
    for name, value in classifier.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("module.", "holds tensors both with and without 'module.'"),
        ("_orig_mod.", "holds {name} 2 times"),
    ],
)
def test_names_that_become_one_are_refused(wrapper, message):
    """Otherwise the last one in the file would win."""
    model = build_upernet("timm/test_convnext", 3, channels=8, aux_channels=4)
    state = dict(model.backbone.body.state_dict())
    name = next(iter(state))
    state[wrapper + name] = state[name] + 1
    with pytest.raises(WeightsError, match=message.format(name=re.escape(name))):
        load_weights(model, state, partial=True)


def test_wrappers_inside_of_names(classifier):
    """Of compiled, sharded or checkpointed parts of a model."""
    state = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): value
        for name, value in classifier.state_dict().items()
    }
    report = load_weights(build_classifier("tiny", num_classes=7, **SMALL), state, partial=False)
    assert len(report.loaded) == len(state)


class _Detector(nn.Module):
    """As in transformers: with frozen batch norms, which count nothing, and another stem."""

    def __init__(self):
        super().__init__()
        backbone = build_classifier("tiny", num_classes=7, **SMALL)
        self.backbone = freeze_batch_norm_2d(backbone)
        self.decoder = nn.ModuleDict({"stem": nn.Conv2d(3, 3, 1)})


def test_a_backbone_inside_a_model_of_others(classifier):
    model = _Detector()
    report = load_weights(model, classifier.state_dict())
    assert report.new == ["decoder.stem.weight", "decoder.stem.bias"]
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name])


def test_strict_in_spite_of_prefixes(classifier):
    state = {f"model.{name}": value for name, value in classifier.state_dict().items()}
    model = build_classifier("tiny", num_classes=7, **SMALL)
    with pytest.raises(WeightsError, match=r"unknown to the model \(1\): criterion"):
        load_weights(model, {**state, "criterion.weight": torch.zeros(7)})
    other = {f"net.{name}": value for name, value in classifier.state_dict().items()}
    with pytest.raises(WeightsError, match=r"several .* models, under 'model\.', 'net\.'"):
        load_weights(model, {**state, **other})
    state.pop("model.head.bias")
    with pytest.raises(WeightsError, match=r"missing from the file \(1\): head"):
        load_weights(model, state)


def test_counters_of_batches_may_be_missing(classifier):
    counters = [n for n in classifier.state_dict() if n.endswith("num_batches_tracked")]
    state = {name: x for name, x in classifier.state_dict().items() if name not in counters}
    model = build_classifier("tiny", num_classes=7, **SMALL)
    report = load_weights(model, state, partial=False)
    assert report.new == counters and len(counters) == 8


def test_the_one_model_inside_another(classifier):
    """An encoder of another library, whose decoder is new."""
    features = timm.create_model(
        "spatial_mamba_tiny", features_only=True, out_indices=(0, 2), **SMALL
    )
    holder = torch.nn.ModuleDict({"encoder": torch.nn.Sequential(features)})
    holder["decoder"] = torch.nn.Linear(2, 2)
    report = load_weights(holder, classifier.state_dict(), skip=["encoder.0.model.stem."])
    new = [
        name for name in holder.state_dict() if name.startswith(("encoder.0.model.stem", "decoder"))
    ]
    assert report.new == new
    assert len(report.loaded) == len(holder.state_dict()) - len(new)
    expected = classifier.state_dict()["stages.2.blocks.0.ln1.weight"]
    assert torch.equal(features.state_dict()["model.stages.2.blocks.0.ln1.weight"], expected)
    assert any(name.startswith("stages.3.") for name in report.ignored)
    with pytest.raises(WeightsError, match=r"must hold all parameters of ModuleDict"):
        load_weights(holder, classifier.state_dict(), partial=False)


def test_classifier_into_backbone_is_reported(official):
    backbone = build_backbone("tiny", **SMALL)
    report = load_weights(backbone, official)
    assert all(name.startswith("output_norms.") for name in report.new) and len(report.new) == 8
    assert sorted(report.ignored) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert "8" in str(report) and "output_norms.res2.*" in str(report)


def test_detector_into_backbone(classifier):
    backbone = build_backbone("tiny", **SMALL)
    state = {f"backbone.bottom_up.{k}": v for k, v in backbone.state_dict().items()}
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(3, 4)
    other = build_backbone("tiny", **SMALL)
    load_weights(other, state)
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in other.state_dict().items())


@pytest.fixture
def segmentor():
    return build_upernet("tiny", num_classes=5, channels=8, aux_channels=8, **SMALL)


@pytest.mark.parametrize("names", ["official", "ours"])
def test_segmentor_whole(names, segmentor):
    state = segmentor.state_dict()
    if names == "official":
        state = {to_official(name): value for name, value in state.items()}
        assert "decode_head.psp_modules.0.1.conv.weight" in state
    other = build_upernet("tiny", num_classes=5, channels=8, aux_channels=8, **SMALL)
    report = load_weights(other, {"state_dict": state})
    assert not report.new and not report.ignored
    for name, value in segmentor.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_classifier_into_segmentor(official, classifier, segmentor):
    heads = segmentor.decode_head.classify.weight.clone()
    report = load_weights(segmentor, official)
    weight = "stages.2.blocks.0.ssm.in_proj.weight"
    expected = classifier.state_dict()[weight]
    assert torch.equal(segmentor.state_dict()[f"backbone.{weight}"], expected)
    assert torch.equal(segmentor.decode_head.classify.weight, heads)
    new = ("decode_head.", "auxiliary_head.", "backbone.output_norms.")
    assert all(name.startswith(new) for name in report.new)
    assert sorted(report.loaded + report.new) == sorted(segmentor.state_dict())
    assert len(report.ignored) == 4  # norm and head

    rows = {line.split()[0]: line.split()[1:] for line in str(report).splitlines()}
    stage = sum(name.startswith("backbone.stages.2.") for name in report.loaded)
    assert rows["backbone.stages.2"] == [str(stage), "-", "-"]
    decode_head = sum(name.startswith("decode_head.") for name in segmentor.state_dict())
    assert rows["decode_head"] == ["-", str(decode_head), "-"]
    assert rows["head"] == ["-", "-", "2"]  # under the name that the file has
    groups = {name.rsplit(".", 1)[0] for name in report.new}
    assert all(f"{group}.*" in str(report) for group in groups)  # each one by name


def test_segmentor_into_backbone_and_back(segmentor):
    backbone = build_backbone("tiny", **SMALL)
    report = load_weights(backbone, segmentor.state_dict())
    assert not report.new
    for name, value in backbone.state_dict().items():
        assert torch.equal(segmentor.state_dict()[f"backbone.{name}"], value)
    other = build_upernet("tiny", num_classes=3, channels=8, aux_channels=8, **SMALL)
    detector = {f"backbone.bottom_up.{k}": v for k, v in backbone.state_dict().items()}
    for state in (backbone.state_dict(), detector):
        report = load_weights(other, state)
        assert all(name.startswith(("decode_head.", "auxiliary_head.")) for name in report.new)


def test_segmentor_of_other_classes_needs_a_word(segmentor):
    other = build_upernet("tiny", num_classes=3, channels=8, aux_channels=8, **SMALL)
    message = r"decode_head.classify.weight is \[5, 8, 1, 1\], must be \[3, 8, 1, 1\]"
    with pytest.raises(WeightsError, match=message):
        load_weights(other, segmentor.state_dict())
    skip = ["decode_head.classify", "auxiliary_head.classify"]
    report = load_weights(other, segmentor.state_dict(), skip=skip)
    assert len(report.new) == 4


def test_half_a_segmentor_is_an_error(segmentor):
    state = segmentor.state_dict()
    del state["decode_head.fuse.conv.weight"]
    with pytest.raises(
        WeightsError, match=r"missing from the file \(1\): decode_head\.fuse\.conv\.\*"
    ):
        load_weights(segmentor, state)


def test_other_classes_need_a_word(official):
    model = build_classifier("tiny", num_classes=3, **SMALL)
    with pytest.raises(WeightsError, match=r"head.weight is \[7, 128\], must be \[3, 128\]"):
        load_weights(model, official)
    before = model.head.weight.clone()
    report = load_weights(model, official, skip=["head."])
    assert report.new == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before)


def test_wrong_variant_changes_nothing(official):
    model = build_classifier("tiny", num_classes=7, embed_dim=32, depths=(1, 1, 1, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError, match="another variant"):
        load_weights(model, official)
    deeper = build_classifier("tiny", num_classes=7, embed_dim=16, depths=(1, 1, 2, 1))
    with pytest.raises(WeightsError, match=r"missing from the file.*stages\.2"):
        load_weights(deeper, official)
    with pytest.raises(WeightsError, match="unknown to the model"):
        load_weights(
            build_classifier("tiny", num_classes=7, **SMALL),
            deeper.state_dict(),
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_missing_parameter_is_an_error(official):
    del official["layers.0.blocks.0.self_attention.Ds"]
    with pytest.raises(
        WeightsError, match=r"missing from the file \(1\): stages\.0\.blocks\.0\.ssm\.\*"
    ):
        load_weights(build_classifier("tiny", num_classes=7, **SMALL), official)


def test_no_matching_key(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "r50.pth")
    with pytest.raises(WeightsError, match=r"none of the 2 keys of .*r50.pth.*conv1.weight"):
        load_weights(build_backbone("tiny", **SMALL), tmp_path / "r50.pth")


def test_no_tensors():
    with pytest.raises(WeightsError, match="holds no tensors.*its keys: epoch"):
        load_weights(build_backbone("tiny", **SMALL), {"epoch": 3})


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere.pth"):
        load_weights(build_backbone("tiny", **SMALL), tmp_path / "nowhere.pth")


def test_a_partial_checkpoint_is_refused_where_all_is_needed(official, segmentor):
    before = {k: v.clone() for k, v in segmentor.state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"must hold all parameters of UPerNet(.|\n)*decode_head"
    ):
        load_weights(segmentor, official, partial=False)
    assert all(torch.equal(v, before[k]) for k, v in segmentor.state_dict().items())
    classifier = build_classifier("tiny", num_classes=7, **SMALL)
    assert not load_weights(classifier, official, partial=False).new
    with pytest.raises(WeightsError, match=r"missing or skipped \(2\): head\.\*"):
        load_weights(classifier, official, partial=False, skip=["head."])


def test_a_prefix_to_skip_must_match(official, classifier):
    message = r"got 'heads\.', which matches none of them; the nearest one is 'head'"
    with pytest.raises(ValueError, match=message):
        load_weights(classifier, official, skip=["head.", "heads."])


def test_skip_reaches_the_backbone_of_another_kind_of_model(official, segmentor):
    before = segmentor.state_dict()["backbone.stem.conv1.conv.weight"].clone()
    report = load_weights(segmentor, official, skip=["backbone.stem."])
    assert torch.equal(segmentor.state_dict()["backbone.stem.conv1.conv.weight"], before)
    assert all(not name.startswith("backbone.stem.") for name in report.loaded)


def test_a_converted_backbone_initialises_a_detector():
    """``convert_weights --to detectron2 --only backbone`` writes nothing but a backbone."""
    backbone = build_backbone("tiny", **SMALL)

    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Module()
            self.backbone.bottom_up = build_backbone("tiny", **SMALL)
            self.roi_heads = torch.nn.Linear(2, 2)

    detector = Detector()
    state = {f"backbone.bottom_up.{name}": x for name, x in backbone.state_dict().items()}
    report = load_weights(detector, state)
    assert report.new == ["roi_heads.weight", "roi_heads.bias"]
    del state["backbone.bottom_up.stem.conv1.conv.weight"]
    with pytest.raises(WeightsError, match="missing from the file .1."):
        load_weights(detector, state)


def test_unused_heads_are_reported(segmentor):
    state = segmentor.state_dict()
    report = load_weights(build_backbone("tiny", **SMALL), state)
    heads = [name for name in state if not name.startswith("backbone.")]
    assert report.ignored == heads


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (build_classifier, "('head',)"),
        (build_upernet, "('decode_head.classify', 'auxiliary_head.classify',)"),
    ],
)
def test_the_key_that_skips_what_does_not_fit_is_named_with_its_value(build, expected):
    def of(num_classes):
        return build("tiny", num_classes=num_classes, **SMALL)

    with pytest.raises(WeightsError) as caught:
        load_weights(of(3), of(2).state_dict())
    (skip,) = re.findall(r'MODEL\.WEIGHTS_SKIP "(.+)"', str(caught.value))
    assert skip == expected
    report = load_weights(of(3), of(2).state_dict(), skip=ast.literal_eval(skip))
    assert report.new and all(name.startswith(ast.literal_eval(skip)) for name in report.new)
    with pytest.raises(WeightsError) as caught:  # another variant has no such hint
        load_weights(of(3), build("tiny", num_classes=3, embed_dim=8, depths=(1,) * 4).state_dict())
    assert "WEIGHTS_SKIP" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 2, 4, 7, 16])
def test_rgb_weights_start_other_channels(channels, test_variant):
    """Repeated channels give what the RGB image gave; only where a training starts."""
    torch.manual_seed(0)
    rgb = build_backbone(test_variant).eval()
    other = build_backbone(test_variant, in_chans=channels).eval()
    name = "stem.conv1.conv.weight"
    report = load_weights(other, rgb.state_dict())
    assert report.inflated == name and f"from RGB to other channels: {name}" in str(report)
    image = torch.rand(1, 3 if channels >= 3 else 1, 32, 32)
    repeated = image[:, torch.arange(channels) % image.shape[1]]
    with torch.no_grad():
        found, expected = other(repeated), rgb(image.expand(-1, 3, -1, -1))
    for level, value in expected.items():
        assert (found[level] - value).abs().max() <= 1e-6 * value.abs().max(), level
    with pytest.raises(WeightsError, match=r"stem\.conv1\.conv\.weight is"):
        load_weights(other, rgb.state_dict(), partial=False)
    assert load_weights(rgb, rgb.state_dict()).inflated == ""
