"""Checkpoints: what is loaded, what is refused, and that none is ever half written."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from spatial_mamba_d2.detection.checkpoint import SafeCheckpointer
from spatial_mamba_d2.detection.config import load_config
from spatial_mamba_d2.models import build_classifier, load_weights
from spatial_mamba_d2.models.checkpoints.names import to_official
from spatial_mamba_d2.models.checkpoints.reading import WeightsError, read_checkpoint


@pytest.fixture
def model(make_cfg):
    return build_model(make_cfg())


def test_official_classifier_fills_the_backbone(model, tmp_path):
    classifier = build_classifier("test")
    path = tmp_path / "imagenet.pth"
    torch.save({"model": {to_official(k): v for k, v in classifier.state_dict().items()}}, path)
    report = load_weights(model, path)
    weight = "stages.2.blocks.0.ssm.in_proj.weight"
    assert torch.equal(
        model.state_dict()[f"backbone.bottom_up.{weight}"], classifier.state_dict()[weight]
    )
    assert all(name.startswith("backbone.bottom_up.") for name in report.loaded)
    assert sorted(report.loaded + report.new) == sorted(model.state_dict())
    assert any("roi_heads" in name for name in report.new)
    assert "not used (4): norm.*, head.*" in str(report)


def test_own_detector_and_other_classes(model, make_cfg, tmp_path):
    path = tmp_path / "detector.pth"
    torch.save({"model": model.state_dict()}, path)
    other = build_model(make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 3))
    with pytest.raises(WeightsError, match=r"cls_score.weight is \[6, 256\], must be \[4, 256\]"):
        load_weights(other, path)
    skip = ("roi_heads.box_predictor", "roi_heads.mask_head.predictor")
    report = load_weights(other, path, skip=skip)
    assert len(report.new) == 6 and all(name.startswith(skip) for name in report.new)


def test_wrong_variant_is_refused(model, tmp_path):
    wide = build_classifier("test", embed_dim=32)
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(WeightsError, match="another variant"):
        load_weights(model, tmp_path / "wide.pth")


def test_save_and_resume(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    saver = SafeCheckpointer(model, str(tmp_path), classes=["a", "b"], optimizer=optimizer)
    saver.save("model_0000004", iteration=4)
    assert saver.get_checkpoint_file() == str(tmp_path / "model_0000004.pth")
    assert read_checkpoint(tmp_path / "model_0000004.pth")["classes"] == ["a", "b"]
    fresh = torch.optim.AdamW(model.parameters(), lr=1.0)
    rest = SafeCheckpointer(model, str(tmp_path), optimizer=fresh).resume_or_load("", resume=True)
    assert rest == {"iteration": 4}
    assert fresh.param_groups[0]["lr"] == 0.25


def test_interrupted_write_leaves_the_old_checkpoint(model, tmp_path, monkeypatch):
    saver = SafeCheckpointer(model, str(tmp_path))
    saver.save("model_0000001", iteration=1)

    def half(content, path):
        path.write_bytes(b"PK half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    for name in ("model_0000002", "model_0000001"):
        with pytest.raises(KeyboardInterrupt):
            saver.save(name, iteration=2)
    monkeypatch.undo()
    assert saver.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert not (tmp_path / "model_0000002.pth").exists()
    assert read_checkpoint(tmp_path / "model_0000001.pth")["iteration"] == 1


def test_skipped_parameters_of_the_backbone(model, tmp_path):
    """``MODEL.WEIGHTS_SKIP`` means the model's names, also of a backbone from a classifier."""
    torch.save({"model": build_classifier("test").state_dict()}, tmp_path / "classifier.pth")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    skip = ("backbone.bottom_up.stem.",)
    SafeCheckpointer(model, str(tmp_path), skip=skip).resume_or_load(
        str(tmp_path / "classifier.pth"), resume=False
    )
    stem = "backbone.bottom_up.stem.conv1.conv.weight"
    assert torch.equal(model.state_dict()[stem], before[stem])
    stage = "backbone.bottom_up.stages.0.blocks.0.cpe1.weight"
    assert not torch.equal(model.state_dict()[stage], before[stage])


def test_resuming_needs_a_complete_checkpoint(model, tmp_path):
    saver = SafeCheckpointer(model, str(tmp_path))
    saver.save("model_0000001", iteration=1)
    path = tmp_path / "model_0000001.pth"
    content = read_checkpoint(path)
    content["model"] = {k: v for k, v in content["model"].items() if "roi_heads" not in k}
    torch.save(content, path)
    with pytest.raises(WeightsError, match="roi_heads"):
        saver.resume_or_load("", resume=True)


@pytest.mark.parametrize(
    ("name", "new", "unused"),
    [
        ("cascade_mask_rcnn", {"box_head", "box_predictor"}, {"box_head", "box_predictor"}),
        ("point_rend", {"mask_head"}, {"mask_head"}),
        ("faster_rcnn", set(), {"mask_head"}),
        ("panoptic_fpn", {"sem_seg_head"}, set()),
    ],
)
def test_the_authors_mask_rcnn_starts_other_detectors(name, new, unused, root, official_state):
    """They take what they share with it, and the report names the rest."""
    state = {"state_dict": official_state("maskrcnn_tiny")}
    models = [
        build_model(
            load_config(root / f"configs/{n}_spatial_mamba_t.yaml", ["MODEL.DEVICE", "cpu"])
        )
        for n in ("mask_rcnn", name)
    ]
    load_weights(models[0], state, partial=False)
    report = load_weights(models[1], state)
    expected, found = (model.state_dict() for model in models)
    for key in report.loaded:
        assert torch.equal(found[key], expected[key]), key
    heads = {key.removeprefix("roi_heads.").split(".")[0] for key in report.new}
    assert heads == new
    assert {key.removeprefix("roi_heads.").split(".")[0] for key in report.ignored} == unused
    loaded = {".".join(key.split(".")[:2]) for key in report.loaded}
    assert {"backbone.bottom_up", "backbone.fpn_lateral2", "proposal_generator.rpn_head"} <= loaded
    assert "new, at their initial values" in str(report) or not new
    with pytest.raises(WeightsError, match="must hold all parameters|unknown to the model|missing"):
        load_weights(models[1], state, partial=False)


def test_a_part_of_a_detector_is_complete_or_absent(root, official_state):
    state = official_state("maskrcnn_tiny")
    del state["roi_head.mask_head.convs.1.conv.weight"]
    config = root / "configs/mask_rcnn_spatial_mamba_t.yaml"
    model = build_model(load_config(config, ["MODEL.DEVICE", "cpu"]))
    with pytest.raises(WeightsError, match=r"missing from the file \(1\): roi_heads.mask_head.mas"):
        load_weights(model, {"state_dict": state})
