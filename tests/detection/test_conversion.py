"""Converted checkpoints in Detectron2's own hands, and official ones in ours."""

from __future__ import annotations

import logging
import os
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.detection.predict import Predictor
from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.models.checkpoints.convert import convert_weights, save_official
from spatial_mamba_d2.models.checkpoints.names import translate
from spatial_mamba_d2.models.checkpoints.reading import WeightsError


def test_detectron2_loads_a_converted_mask_rcnn(root, official_state, tmp_path, caplog):
    """All tensors, bit for bit, with nothing of ours but the registered backbone."""
    state = official_state("maskrcnn_tiny")
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "mmdet.pth")
    convert_weights(tmp_path / "mmdet.pth", tmp_path / "detectron2.pth", "detectron2")
    config = root / "configs/mask_rcnn_spatial_mamba_t.yaml"
    model = build_model(load_config(config, ["MODEL.DEVICE", "cpu"]))
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model).load(str(tmp_path / "detectron2.pth"))
    assert not caplog.records  # of skipped, missing or unexpected names
    loaded, expected = model.state_dict(), translate(state)
    assert sorted(loaded) == sorted(expected)
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_detectron2_loads_a_converted_backbone(make_cfg, tmp_path):
    classifier = build_classifier("test")
    save_official(classifier, tmp_path / "imagenet.pth")
    target = tmp_path / "backbone.pth"
    convert_weights(tmp_path / "imagenet.pth", target, "detectron2", only="backbone")
    model = build_model(make_cfg())
    DetectionCheckpointer(model).load(str(target))
    backbone = model.backbone.bottom_up.state_dict()
    shared = [name for name in classifier.state_dict() if name in backbone]
    assert len(shared) == len(classifier.state_dict()) - 4  # norm and head
    assert all(torch.equal(backbone[name], classifier.state_dict()[name]) for name in shared)


def test_the_log_of_fine_tuning_says_what_is_new(make_cfg, tmp_path, caplog):
    path = tmp_path / "imagenet.pth"
    save_official(build_classifier("test"), path)
    model = build_model(make_cfg())
    with caplog.at_level(logging.INFO):
        SafeCheckpointer(model, str(tmp_path)).resume_or_load(str(path), resume=False)
    report = next(r.message for r in caplog.records if "tensors loaded" in r.message)
    rows = {line.split()[0]: line.split()[1:] for line in report.splitlines()[1:]}
    state = list(model.state_dict())

    def number(prefix):
        return str(sum(name.startswith(prefix) for name in state))

    stage = "backbone.bottom_up.stages.2"
    assert rows[stage] == [number(stage + "."), "-", "-"]
    for part in ("proposal_generator", "roi_heads.mask_head", "backbone.bottom_up.output_norms"):
        assert rows[part] == ["-", number(part + "."), "-"]
    assert rows["head"] == ["-", "-", "2"]
    new = {name.rsplit(".", 1)[0] for name in state if "bottom_up.st" not in name}
    assert all(f"{name}.*" in report for name in new)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_our_tools_do_not_unpickle(make_cfg, tmp_path):
    """Detectron2's checkpointer would, for a name that ends with .pkl."""
    marker, path = tmp_path / "executed", tmp_path / "model_final.pkl"
    content = {"model": {}, "__author__": "x", "payload": Malicious(marker)}
    path.write_bytes(pickle.dumps(content))
    cfg = make_cfg("MODEL.WEIGHTS", path)
    readers = (
        lambda: SafeCheckpointer(build_model(cfg), str(tmp_path)).load(str(path)),
        lambda: SafeCheckpointer(build_model(cfg), "").resume_or_load(str(path), resume=False),
        lambda: Predictor(cfg),
        lambda: convert_weights(path, tmp_path / "out.pth", "ours"),
    )
    for read in readers:
        with pytest.raises(WeightsError, match="model_final.pkl is a raw pickle"):
            read()
    assert not marker.exists()
