"""The model of ``examples/timm`` computes the same as ours, from the same weights."""

from __future__ import annotations

import pytest
import timm
import torch

from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.models.checkpoints.names import to_official
from spatial_mamba_d2.ops import selective_scan

NARROW = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_classes": 5}


@pytest.fixture
def pair(timm_example, tmp_path):
    """Our classifier, and the example's with its weights, from a file as the authors write it."""
    torch.manual_seed(0)
    ours = build_classifier("tiny", **NARROW, drop_path_rate=0.0)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {to_official(name): value for name, value in ours.state_dict().items()}
    torch.save({"model": state, "epoch": 299}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    theirs = timm.create_model(
        "spatialmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **NARROW
    )
    return ours, theirs


@pytest.mark.parametrize("size", [(64, 64), (33, 301), (8, 1200), (1, 1)])
def test_outputs_are_ours(pair, size):
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, actual = (model.eval()(x) for model in pair)
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_features_and_gradients_are_ours(pair):
    x = torch.randn(2, 3, 64, 96)
    sums = []
    for model in pair:
        model.double().train()
        final, stages = model.forward_intermediates(x.double())
        loss = sum((y * y.detach().sin()).mean() for y in (final, *stages))
        loss.backward()
        gradients = sorted(p.grad.norm().item() for p in model.parameters() if p.grad is not None)
        sums.append([loss.item(), *gradients])
    assert len(sums[0]) > 80
    assert sums[1] == pytest.approx(sums[0], rel=1e-4, abs=1e-9)


def test_official_weights_give_official_logits(timm_example, official_state, golden, noise):
    model = timm.create_model("spatialmamba_tiny").eval()
    state = timm_example.checkpoint_filter_fn({"model": official_state("tiny")}, model)
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(noise("input", (1, 3, 96, 128)))
    expected = golden("logits_tiny.npz")["x96x128_logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_parameters_are_the_official_ones(variant, timm_example, golden):
    model = timm.create_model(f"spatialmamba_{variant}", device="meta")
    shapes = golden(f"official_keys_{variant}.json")["keys"]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model.load_state_dict(timm_example.checkpoint_filter_fn(state, model))


def test_wide_rows_and_strong_decay(timm_example):
    """A product of all decays is 0 here, which cumulative sums would divide by."""
    u, dt = torch.randn(1, 2, 700, 4), torch.rand(1, 2, 700, 4) * 5
    B = torch.randn(1, 2, 700, 1)
    A = -torch.tensor([0.01, 0.5, 5.0, 50.0])
    h = timm_example.selective_scan(u, dt, A, B)
    before_softplus = torch.expm1(dt.double()).log().flatten(1, 2)
    expected = selective_scan(
        u.double().flatten(1, 2),
        before_softplus,
        A.double(),
        B.double().flatten(1),
        torch.zeros(4, dtype=torch.float64),
    )
    torch.testing.assert_close(h.flatten(1, 2), expected.float(), rtol=1e-4, atol=1e-5)
