"""Hooks, adapters and reparametrisations of layers take effect, and every module is called once."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from spatial_mamba_d2.models import build_backbone
from tests.models.gradients import (
    SMALL,
    assert_close,
    assert_equal,
    gradients_of,
    loss_of,
    narrow_backbone,
)


@pytest.fixture
def backbone():
    return narrow_backbone()


def register_counters(model):
    forward_pre, forward, backward = Counter(), Counter(), Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: forward_pre.update([name]))
        module.register_forward_hook(lambda *_, name=name: forward.update([name]))
        if module is not model:  # a dictionary of outputs has no backward hooks
            module.register_full_backward_hook(lambda *_, name=name: backward.update([name]))
    return forward_pre, forward, backward


# The fusion has weights alone: nothing that goes into it requires a gradient.
without_inputs = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@without_inputs
def test_hooks_fire_once(backbone):
    containers = (nn.ModuleList, nn.ModuleDict)
    expected = {
        name: 1 for name, module in backbone.named_modules() if not isinstance(module, containers)
    }
    forward_pre, forward, backward = register_counters(backbone)
    loss_of(backbone, torch.randn(2, 3, 64, 64, requires_grad=True)).backward()
    assert forward_pre == expected
    assert forward == expected
    assert backward == {name: count for name, count in expected.items() if name}


@without_inputs
def test_hooks_do_not_change_gradients(backbone):
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    expected = gradients_of(backbone, x)
    register_counters(backbone)
    assert_close(gradients_of(backbone, x), expected, tolerance=1e-4)


def test_functional_call_uses_the_given_weights(backbone):
    other = build_backbone("tiny", **SMALL).train()
    x = torch.randn(2, 3, 64, 64)
    expected = gradients_of(other, x)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    torch.manual_seed(1)
    outputs = functional_call(backbone, given, (x,)).values()
    loss = sum(output.pow(3).mean() for output in outputs)
    gradients = torch.autograd.grad(loss, list(given.values()))
    assert_equal(dict(zip(given, gradients, strict=True)), expected)


class LowRank(nn.Module):
    """An adapter around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def linear_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_adapters_on_all_linear_layers_act_and_train(backbone):
    x = torch.randn(2, 3, 64, 64)
    backbone.eval()
    names = linear_layers(backbone)
    assert len(names) == 6 * 5  # in_proj, x_proj, dt_proj, out_proj, fc1, fc2 of five blocks
    before = backbone(x)
    for name in names:
        adapted = copy.deepcopy(backbone)
        parent, _, key = name.rpartition(".")
        adapter = LowRank(adapted.get_submodule(name))
        setattr(adapted.get_submodule(parent), key, adapter)
        after = adapted(x)
        assert any(not torch.equal(after[level], before[level]) for level in before), name
        loss_of(adapted, x).backward()
        for part in (adapter.down, adapter.up):
            assert part.weight.grad.abs().max() > 0, name


def test_a_frozen_layer_gets_no_gradient_and_passes_one_on(backbone):
    x = torch.randn(2, 3, 64, 64)
    expected = gradients_of(backbone, x)
    ssm = backbone.stages[1].blocks[0].ssm
    ssm.requires_grad_(False)
    backbone.zero_grad()
    loss_of(backbone, x).backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0, msg=name)
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("kind", ["prune", "weight_norm"])
def test_reparametrisations_take_effect(kind, backbone):
    x = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    with torch.no_grad():
        before = loss_of(backbone, x)
    for name in linear_layers(backbone):
        layer = backbone.get_submodule(name)
        if kind == "prune":
            prune.l1_unstructured(layer, "weight", 0.5)
        else:
            parametrizations.weight_norm(layer)
    with torch.no_grad():
        assert torch.allclose(loss_of(backbone, x), before, rtol=1e-3) == (kind == "weight_norm")
    for _ in range(2):
        gradients = gradients_of(backbone, x)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        optimizer.step()
    originals = {
        name: gradient
        for name, gradient in gradients.items()
        if name.endswith(("weight_orig", "parametrizations.weight.original1"))
    }
    assert len(originals) == 30 and all(g.any() for g in originals.values())
