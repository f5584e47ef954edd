"""Reading, recognising, translating and strictly loading checkpoints."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import sys
import types

import pytest
import torch

from spatial_mamba_d2.models import (
    build_backbone,
    build_classifier,
    load_weights,
    read_checkpoint,
)
from spatial_mamba_d2.models.weights import WeightsError, to_official, to_ours

SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1)}


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return build_classifier("tiny", num_classes=7, **SMALL)


@pytest.fixture
def official(classifier):
    return {to_official(name): value for name, value in classifier.state_dict().items()}


@pytest.mark.parametrize(
    "model", [f"{head}{v}" for head in ("", "maskrcnn_") for v in ("tiny", "small", "base")]
)
def test_names_are_in_bijection(model, golden):
    names = list(golden(f"official_keys_{model}.json")["keys"])
    ours = [to_ours(name) for name in names]
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
    with pytest.raises(WeightsError, match=r"the model needs, and the file lacks.*stages\.2"):
        load_weights(deeper, official)
    with pytest.raises(WeightsError, match="the file has, and the model lacks"):
        load_weights(
            build_classifier("tiny", num_classes=7, **SMALL),
            deeper.state_dict(),
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_missing_parameter_is_an_error(official):
    del official["layers.0.blocks.0.self_attention.Ds"]
    with pytest.raises(WeightsError, match=r"lacks, 1: stages\.0\.blocks\.0\.ssm\.\*"):
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


def test_broken_files_are_named(official, tmp_path):
    torch.save(official, tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    cases = {
        "cut.pth": (content[: len(content) // 2], "is truncated or not a PyTorch checkpoint"),
        "empty.pth": (b"", "is empty"),
        "page.pth": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        "text.pth": (b"hello world, this is no checkpoint", "is truncated or not"),
        "cut.safetensors": (b"\x10\0\0\0", "is truncated or not"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match=f"{name}.*{message}"):
            read_checkpoint(tmp_path / name)


def test_foreign_objects_become_inert(official, tmp_path, monkeypatch):
    """Configurations and logs beside the weights need not be importable."""
    config = types.ModuleType("yacs.config")
    config.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    logging = types.ModuleType("mmengine.logging")
    logging.HistoryBuffer = type("HistoryBuffer", (), {"__module__": "mmengine.logging"})
    history = logging.HistoryBuffer()
    history.values = [1, 2]
    path = tmp_path / "with_config.pth"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs.config", config)
        patch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
        patch.setitem(sys.modules, "mmengine.logging", logging)
        content = {
            "model": official,
            "config": config.CfgNode(A=config.CfgNode(B=1)),
            "log": history,
            "args": argparse.Namespace(lr=1.0),
            "best": torch.tensor(83.5).numpy(),
        }
        torch.save(content, path)
    assert type(read_checkpoint(path)["log"]).__name__ == "Inert"
    assert load_weights(build_classifier("tiny", num_classes=7, **SMALL), path).loaded


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_is_refused(official, tmp_path):
    marker = tmp_path / "executed"
    torch.save({"model": official, "x": Malicious(marker)}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"refers to (posix|nt)\.system.*refused"):
        read_checkpoint(tmp_path / "bad.pth")
    with (tmp_path / "bad.pkl").open("wb") as file:
        pickle.dump({"model": collections.OrderedDict(), "x": Malicious(marker)}, file)
    with pytest.raises(WeightsError, match="not a PyTorch checkpoint"):
        read_checkpoint(tmp_path / "bad.pkl")
    assert not marker.exists()
