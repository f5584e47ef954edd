"""Gradients of a narrow backbone, for tests of how training computes them."""

from __future__ import annotations

import torch

from spatial_mamba_d2.models import build_backbone

SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1), "drop_path_rate": 0.5}


def narrow_backbone():
    torch.manual_seed(0)
    return build_backbone("tiny", **SMALL).train()


def loss_of(model, x):
    torch.manual_seed(1)  # of stochastic depth
    return sum(output.float().pow(3).mean() for output in model(x).values())


def gradients_of(model, x):
    model.zero_grad()
    loss_of(model, x).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(actual, expected, tolerance):
    """Relative to the largest value; a tenth of the largest of all stands for what cancels to 0."""
    assert actual.keys() == expected.keys()
    most = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        scale = value.abs().max().item() + most / 10
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance * scale, msg=name)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)
