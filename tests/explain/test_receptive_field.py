"""Effective receptive fields: of networks whose fields are known, and the tool's files."""

from __future__ import annotations

import json
import os
from functools import partial

import cv2
import numpy as np
import pytest
import timm
import torch
from torch import nn

pytest.importorskip("matplotlib", reason="matplotlib, which draws, is not installed")

from spatial_mamba_d2.data.images import write_image
from spatial_mamba_d2.explain.backbones import build_model, normalize, stage_maps
from spatial_mamba_d2.explain.receptive_field import (
    draw_fields,
    field_sizes,
    plot_receptive_fields,
    receptive_fields,
    size_table,
    smallest_square,
)
from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.models.checkpoints.names import to_official


@pytest.fixture
def images():
    return list(torch.randn(3, 3, 33, 33, generator=torch.Generator().manual_seed(0)))


def positive_convolutions(depth):
    """Each position of the map sums all that ``depth`` kernels of 3x3 reach."""
    layers = [nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(depth)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


def test_the_field_of_convolutions_is_what_they_reach():
    stack = positive_convolutions(4)
    images = [torch.rand(3, 33, 33)]  # positive, so that no ReLU cuts
    (field,) = receptive_fields(lambda x: [stack(x)], images)
    reach = np.abs(np.arange(33) - 16)
    inside = np.maximum(reach[:, None], reach[None]) <= 4
    assert np.array_equal(field > 0, inside)
    np.testing.assert_allclose(field, field.T)
    np.testing.assert_allclose(field, field[::-1, ::-1])
    profile = np.array([1.0])
    for _ in range(4):  # separable: box filters, and sums over three channels
        profile = np.convolve(profile, np.ones(3))
    np.testing.assert_allclose(field[12:21, 12:21], 3**5 * np.outer(profile, profile))


def test_fields_are_means_of_rectified_gradients(images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 3))
    expected = np.zeros((33, 33))
    for image in images:
        x = image[None].double().requires_grad_()
        out = network.double()(x)
        centre = out[0, :, out.shape[2] // 2, out.shape[3] // 2]
        gradient = sum(
            torch.autograd.grad(value, x, retain_graph=True)[0][0] for value in centre if value > 0
        )
        expected += gradient.clamp(min=0).sum(0).numpy() / 3
    network.float()
    (field,) = receptive_fields(lambda x: [network(x)], images)
    np.testing.assert_allclose(field, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(ValueError, match=r"one size, got \[33, 33\] and \[20, 33\]"):
        receptive_fields(lambda x: [network(x)], [images[0], images[0][:, :20]])
    with pytest.raises(ValueError, match="at least one, got none"):
        receptive_fields(lambda x: [network(x)], [])
    with pytest.raises(ValueError, match="image 1 does not"):
        receptive_fields(lambda x: [network(x)], [images[0], images[0] * np.nan])


def test_the_scan_sees_all_before_and_the_fusion_some_after():
    """In the first stage nothing far below reaches the centre, in the last one something does."""
    torch.manual_seed(0)
    model = build_classifier("tiny", embed_dim=16, depths=(1, 1, 1, 1)).eval()
    fields = receptive_fields(partial(stage_maps, model), [torch.randn(3, 160, 160)])
    assert fields.shape == (4, 160, 160)
    above, below = fields[:, :40].sum((1, 2)), fields[:, 128:].sum((1, 2))
    assert (above > 0).all()
    assert below[0] == 0 and below[3] > 0


def test_smallest_square():
    scores = np.zeros((9, 9))
    scores[4, 4], scores[4, 6], scores[0, 0] = 5, 4, 1
    assert smallest_square(scores, 0.2) == (1, 1 / 81)
    assert smallest_square(scores, 0.5) == (5, 25 / 81)
    assert smallest_square(scores, 0.95) == (9, 1.0)
    assert field_sizes(scores)["linear"]["0.5"] == {"side_px": 5, "area": 25 / 81}
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got 1"):
        smallest_square(scores, 1)
    with pytest.raises(ValueError, match="positive sum, got 0"):
        smallest_square(0 * scores, 0.5)


def test_panels(tmp_path):
    fields = {"a": np.random.rand(3, 20, 20), "b": np.random.rand(2, 20, 20)}
    path = tmp_path / "fields.png"
    draw_fields(fields).savefig(path)
    assert cv2.imread(str(path)).shape == (600, 900, 3)


@pytest.mark.slow
def test_models_side_by_side(tmp_path):
    """Ours from the authors' file and one of timm's, on the same images, and once more."""
    torch.manual_seed(0)
    state = {to_official(k): v for k, v in build_classifier("tiny").state_dict().items()}
    torch.save({"model": state}, tmp_path / "official.pth")
    names = ["spatial_mamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny"]
    for run, number in (("one", 3), ("two", 1)):
        plot_receptive_fields(
            names[:number], [tmp_path / "official.pth", None, None][:number], [], tmp_path / run,
            num_images=2, size_px=64, seed=3, device="cpu",
        )  # fmt: skip
    one, two = (np.load(tmp_path / run / "erf.npz") for run in ("one", "two"))
    assert np.array_equal(one[names[0]], two[names[0]])
    for name in names:
        assert one[name].shape == (4, 64, 64)
        assert (one[name] >= 0).all() and (one[name].sum((1, 2)) > 0).all()
    content = json.loads((tmp_path / "one/erf.json").read_text())
    assert content["weights"]["swin_tiny_patch4_window7_224"] == "random"
    assert set(content["sizes"]) == set(names) and content["images"] == "generated"
    assert cv2.imread(str(tmp_path / "one/erf.png")).shape == (900, 1200, 3)


def test_what_cannot_be_shown_is_an_error(tmp_path):
    options = {"num_images": 1, "size_px": 64, "seed": 0, "device": "cpu"}
    with pytest.raises(ValueError, match="model must be spatial_mamba_tiny, .*got 'resnet5'"):
        plot_receptive_fields(["resnet5"], [], [], tmp_path, **options)
    with pytest.raises(ValueError, match="weights must be one for each of 1 models, got 2"):
        plot_receptive_fields(["spatial_mamba_tiny"], [None, None], [], tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        plot_receptive_fields(
            ["spatial_mamba_tiny"], [], [tmp_path / "absent.jpg"], tmp_path, **options
        )
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N, got 'bogus'"):
        plot_receptive_fields(
            ["spatial_mamba_tiny"], [], [], tmp_path, **{**options, "device": "bogus"}
        )
    for name, value in (("num_images", 0), ("size_px", 8)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            plot_receptive_fields(
                ["spatial_mamba_tiny"], [], [], tmp_path, **{**options, name: value}
            )


def test_figures_replace_no_input_and_other_files_only_when_told(tmp_path):
    options = {"num_images": 1, "size_px": 64, "seed": 0, "device": "cpu"}
    write_image(tmp_path / "erf.png", np.zeros((64, 64, 3), np.uint8))
    before = (tmp_path / "erf.png").read_bytes()
    for inputs in ([tmp_path], [tmp_path / "erf.png"]):
        with pytest.raises(ValueError, match=r"erf\.png would be written over the input"):
            plot_receptive_fields(["spatial_mamba_tiny"], [], inputs, tmp_path, **options)
    with pytest.raises(ValueError, match=r"1 files exist already.*--overwrite"):
        plot_receptive_fields(["spatial_mamba_tiny"], [], [], tmp_path, overwrite=False, **options)
    assert (tmp_path / "erf.png").read_bytes() == before


def test_weights_of_other_models_run_no_code_either(tmp_path):
    path = tmp_path / "resnet.pth"
    state = timm.create_model("resnet10t").state_dict()
    torch.save({"state_dict": state}, path)
    loaded = build_model("resnet10t", path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    torch.save({"state_dict": {"conv1.weight": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"resnet\.pth does not fit resnet10t"):
        build_model("resnet10t", path)
    torch.save({"state_dict": state, "run": os.system}, path)
    with pytest.raises(ValueError, match=r"refers to posix\.system, which is not data"):
        build_model("resnet10t", path)


def test_images_are_normalised_as_in_training(caplog):
    with caplog.at_level("WARNING"):
        model = build_model("spatial_mamba_tiny")
    assert "RANDOM weights" in caplog.text and not model.training
    grey = np.full((4, 4, 3), 128, np.uint8)
    expected = (128 / 255 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(model, grey)[:, 0, 0], expected, rtol=1e-5)


def test_the_size_table():
    sizes = [field_sizes(np.pad([[1.0]], 4)), field_sizes(np.ones((9, 9)))]
    blocks = size_table({"a": sizes, "a longer name": sizes[:1]}).split("\n\n")
    assert [block.splitlines()[0] for block in blocks[1:]] == [
        "log10(1 + score), as RepLKNet",
        "score",
    ]
    assert blocks[2].splitlines()[1:] == [
        "model          stage     t = 20%     t = 30%     t = 50%      t = 99%",
        "a                  1   1 px 1.2%   1 px 1.2%   1 px 1.2%    1 px 1.2%",
        "a                  2  5 px 30.9%  5 px 30.9%  7 px 60.5%  9 px 100.0%",
        "a longer name      1   1 px 1.2%   1 px 1.2%   1 px 1.2%    1 px 1.2%",
    ]


@pytest.mark.parametrize("tool", ["plot_erf", "plot_states"])
def test_the_tools(tool, run_tool, tmp_path):
    done = run_tool(f"{tool}.py", "--number", 1, "--size-px", 64, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "spatial_mamba_tiny has RANDOM weights" in done.stderr
    written = {path.name for path in tmp_path.iterdir()}
    expected = {"plot_erf": {"erf.png", "erf.json", "erf.npz"}, "plot_states": {"states_0.png"}}
    assert written == expected[tool]
