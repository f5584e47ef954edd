"""Conversion between the authors' format, ours, Detectron2's and safetensors."""

from __future__ import annotations

import pytest
import torch

from spatial_mamba_d2.models import (
    build_backbone,
    build_classifier,
    build_upernet,
    load_weights,
    read_checkpoint,
)
from spatial_mamba_d2.models.checkpoints.convert import (
    convert_weights,
    inspect_state,
    save_official,
)
from spatial_mamba_d2.models.checkpoints.names import to_official, translate
from spatial_mamba_d2.models.checkpoints.reading import WeightsError, unwrap

MODELS = [f"{head}{v}" for head in ("", "maskrcnn_", "upernet_") for v in ("tiny", "small", "base")]
KINDS = {"": "classifier", "maskrcnn": "detector", "upernet": "segmentor"}
SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1)}


def numbered(shapes):
    """Tensors of ``shapes``, each of one number of its own, which take no memory."""
    return {name: torch.full((), float(i)).expand(shape) for i, (name, shape) in enumerate(shapes)}


def read(path):
    return read_checkpoint(path)["model"]


def assert_equal(a, b):
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_official_to_ours_to_official(model, golden, tmp_path):
    """Whole files of all published architectures; also their exact numbers of parameters."""
    keys = golden(f"official_keys_{model}.json")
    state = numbered(keys["keys"].items())
    head, _, variant = model.rpartition("_")
    wrapper = "state_dict" if head else "model"
    names = ("official.pth", "ours.pth", "again.pth")
    official, ours, again = (tmp_path / name for name in names)
    torch.save({wrapper: state}, official)
    contents = convert_weights(official, ours, "ours")
    assert (contents.kind, contents.variant) == (KINDS[head], variant)
    assert contents.tensors == len(state)
    assert contents.parameters == keys["params"]
    assert not any(name.startswith(("backbone.layers", "layers")) for name in read(ours))
    convert_weights(ours, again, "official")
    assert_equal(read_checkpoint(again)[wrapper], state)


@pytest.mark.parametrize("model", ["tiny", "maskrcnn_tiny"])
def test_bits_survive_all_formats(model, official_state, tmp_path):
    state = official_state(model)
    path = tmp_path / "official.pth"
    torch.save({"state_dict": state}, path)
    formats = ["safetensors", "ours", "official"]
    if model.startswith("maskrcnn"):
        formats.insert(1, "detectron2")
    for to in formats:
        suffix = ".safetensors" if to == "safetensors" else ".pth"
        following = tmp_path / f"{to}{suffix}"
        convert_weights(path, following, to)
        path.unlink()
        path = following
    content = unwrap(read_checkpoint(path))
    assert sorted(content) == sorted(state)
    assert all(torch.equal(content[name], value) for name, value in state.items())


@pytest.mark.parametrize("build", [build_classifier, build_backbone, build_upernet])
def test_save_official_takes_models(build, tmp_path):
    model = build("tiny", **SMALL)
    save_official(model, tmp_path / "official.pth")
    content = read_checkpoint(tmp_path / "official.pth")
    state = content["state_dict" if build is build_upernet else "model"]
    assert list(state) == [to_official(name) for name in model.state_dict()]
    other = build("tiny", **SMALL)
    assert not load_weights(other, tmp_path / "official.pth").new
    assert_equal(other.state_dict(), model.state_dict())


@pytest.fixture
def official_classifier(tmp_path):
    path = tmp_path / "classifier.pth"
    save_official(build_classifier("tiny", num_classes=7, **SMALL), path)
    return path


def test_only_the_backbone(official_classifier, official_state, tmp_path):
    backbone = tmp_path / "backbone.pth"
    contents = convert_weights(official_classifier, backbone, "official", only="backbone")
    assert (contents.kind, contents.variant) == ("backbone", "custom")
    assert not any(name.startswith(("norm.", "head.")) for name in read(backbone))

    detector = official_state("maskrcnn_tiny")
    torch.save({"state_dict": detector}, tmp_path / "detector.pth")
    convert_weights(tmp_path / "detector.pth", backbone, "official", only="backbone")
    expected = {
        name.removeprefix("backbone."): x
        for name, x in detector.items()
        if name.startswith("backbone.")
    }
    assert_equal(read(backbone), expected)


def test_parts_without_a_place_must_be_left_out_by_name(official_classifier, tmp_path):
    target = tmp_path / "out.pth"
    message = "no place for the other parts of a classifier; --only backbone"
    with pytest.raises(WeightsError, match=message):
        convert_weights(official_classifier, target, "detectron2")
    assert not target.exists()
    convert_weights(official_classifier, target, "detectron2", only="backbone")
    assert all(name.startswith("backbone.bottom_up.") for name in read(target))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "stages.2.blocks.0.ssm.D",
            "complete segmentor: 1 missing, such as backbone.stages.2",
        ),
        ("stem.conv3.1.conv.weight", "does not hold a complete backbone"),
    ],
)
def test_partial_states_are_refused(lost, message, tmp_path):
    state = build_upernet("tiny", channels=8, aux_channels=8, **SMALL).state_dict()
    del state[f"backbone.{lost}"]
    with pytest.raises(WeightsError, match=message):
        save_official(state, tmp_path / "out.pth")
    state = {name: x for name, x in state.items() if not name.startswith("auxiliary_head.")}
    with pytest.raises(WeightsError):
        save_official(state, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_foreign_tensors_and_mixed_variants_are_refused():
    state = build_classifier("tiny", **SMALL).state_dict()
    with pytest.raises(WeightsError, match="1 unknown, such as ema.decay"):
        inspect_state({**state, "ema.decay": torch.ones(1)})
    wide = build_classifier("tiny", embed_dim=32, depths=(1, 1, 1, 1)).state_dict()
    name = "stages.0.blocks.0.ssm.in_proj.weight"
    with pytest.raises(WeightsError, match=f"1 of another shape, such as {name}"):
        inspect_state({**state, name: wide[name]})


def test_other_heads_than_the_authors_have_no_official_names(official_state, tmp_path):
    state = translate(official_state("maskrcnn_tiny"))
    del state["roi_heads.mask_head.mask_fcn4.weight"]
    del state["roi_heads.mask_head.mask_fcn4.bias"]
    with pytest.raises(WeightsError, match=r"2 are missing or unknown, such as .*mask_fcn4.bias"):
        save_official(state, tmp_path / "out.pth")
    torch.save({"model": state}, tmp_path / "shallow.pth")
    convert_weights(tmp_path / "shallow.pth", tmp_path / "out.safetensors", "safetensors")


def test_arguments_are_checked(official_classifier, tmp_path):
    with pytest.raises(ValueError, match="to must be one of official, .* got 'onnx'"):
        convert_weights(official_classifier, tmp_path / "a.onnx", "onnx")
    with pytest.raises(ValueError, match="only must be one of backbone, got 'head'"):
        convert_weights(official_classifier, tmp_path / "a.pth", "ours", only="head")
    for name, to in (("a.pth", "safetensors"), ("a.safetensors", "ours")):
        with pytest.raises(ValueError, match=rf"target must end with .safetensors .*got .*{name}"):
            convert_weights(official_classifier, tmp_path / name, to)
    with pytest.raises(WeightsError, match="SHA-256"):
        convert_weights(official_classifier, tmp_path / "a.pth", "ours", sha256="0" * 64)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "r50.pth")
    with pytest.raises(WeightsError, match="none of the 1 keys"):
        convert_weights(tmp_path / "r50.pth", tmp_path / "a.pth", "ours")


def test_no_file_is_written_over(official_classifier, tmp_path):
    before = official_classifier.read_bytes()
    (tmp_path / "link.pth").symlink_to(official_classifier)
    for target in (official_classifier, tmp_path / "link.pth", tmp_path / "x/../link.pth"):
        with pytest.raises(ValueError, match="target must be another file than the source"):
            convert_weights(official_classifier, target, "ours")
    (tmp_path / "mine.pth").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"target exists already: .*mine\.pth; --overwrite"):
        convert_weights(official_classifier, tmp_path / "mine.pth", "ours", overwrite=False)
    assert official_classifier.read_bytes() == before
    assert (tmp_path / "mine.pth").read_bytes() == b"mine"
    convert_weights(official_classifier, tmp_path / "mine.pth", "ours")


def test_the_tool(official_classifier, run_tool, tmp_path):
    target = tmp_path / "new folder/ours.safetensors"
    run = run_tool("convert_weights.py", official_classifier, target, "--to", "safetensors")
    assert run.returncode == 0, run.stderr
    assert f"{target}: custom classifier, 175 tensors, 486,091 parameters" in run.stdout
    assert not load_weights(build_classifier("tiny", num_classes=7, **SMALL), target).new
