"""The hand-written backward pass of a block's branches against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spatial_mamba_d2.models import branches
from spatial_mamba_d2.models.layers import DepthwiseConv
from spatial_mamba_d2.models.pointwise import Pointwise
from spatial_mamba_d2.models.recompute import recomputation
from spatial_mamba_d2.models.spatial_mamba import Block
from tests.models.gradients import assert_close

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


@pytest.fixture
def block():
    torch.manual_seed(0)
    return new_block()


def new_block(drop_path=0.5):
    block = Block(16, ssm_ratio=2.0, mlp_ratio=3.0, drop_path=drop_path).double().train()
    with torch.no_grad():
        for p in block.parameters():  # none of them is 0 or 1
            p.add_(0.1 * torch.randn_like(p))
    return block


@pytest.fixture
def calls(monkeypatch):
    """How many branches had a backward pass of their own."""
    found = []
    gradients = branches._gradients

    def counted(*args):
        found.append(1)
        return gradients(*args)

    monkeypatch.setattr(branches, "_gradients", counted)
    return found


def gradients_of(block, x, leaves=None):
    """By name; that of the input is ``""``."""
    x = x.detach().requires_grad_()
    leaves = {"": x, **dict(block.named_parameters())} if leaves is None else leaves
    leaves = {name: p for name, p in leaves.items() if p.requires_grad}
    torch.manual_seed(1)  # of stochastic depth
    loss = (block(x) * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def plain_gradients_of(block, x):
    with recomputation(False):
        return gradients_of(block, x)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7, 16), (1, 1, 1, 16), (2, 35, 33, 16)], ids=str)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_gradients_are_those_of_autograd(shape, dtype, drop_path, calls):
    torch.manual_seed(0)
    block, x = new_block(drop_path).to(dtype), torch.randn(shape, dtype=dtype)
    expected = plain_gradients_of(block, x)
    assert not calls
    actual = gradients_of(block, x)
    assert len(calls) == 2
    assert_close(actual, expected, TOLERANCE[dtype])
    assert all(actual[name].dtype == value.dtype for name, value in expected.items())


def test_under_autocast(block, calls):
    block, x = block.float(), torch.randn(2, 13, 11, 16)
    gradients = []
    for enabled in (False, True):
        with recomputation(enabled):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16):
                y = block(x)
            assert y.dtype == torch.float32  # x is, and the sums are
            block.zero_grad()
            y.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in block.named_parameters()})
    assert len(calls) == 2
    assert_close(gradients[1], gradients[0], 2e-2)


@pytest.mark.parametrize(
    "frozen", ["ln1", "ssm.in_proj", "ssm.conv", "mlp", "mlp.fc2", "ssm.A_log"]
)
def test_what_is_frozen_gets_no_gradient(frozen, block, calls):
    x = torch.randn(1, 5, 4, 16, dtype=torch.float64)
    expected = plain_gradients_of(block, x)
    for name, p in block.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    actual = gradients_of(block, x)
    assert len(calls) == 2 and len(actual) < len(expected)
    assert_close(actual, {name: expected[name] for name in actual}, 1e-12)


def test_products_for_frozen_weights_are_not_computed(block, calls, monkeypatch):
    block.requires_grad_(False)
    monkeypatch.setattr(branches, "pointwise_grad_weight", None)  # not to be called
    assert list(gradients_of(block, torch.randn(1, 3, 4, 16).double())) == [""]
    assert len(calls) == 2


def _hooked(block):
    block.mlp.act.register_forward_hook(lambda module, inputs, output: output)
    block.ssm.conv.register_full_backward_hook(lambda module, grad_input, grad_output: None)


def _adapted(block):
    block.ssm.x_proj = nn.Sequential(block.ssm.x_proj)
    block.mlp.fc1 = nn.Sequential(block.mlp.fc1)


def _subclassed(block):
    class Other(DepthwiseConv):
        def forward(self, x):
            return 2 * super().forward(x)

    block.ssm.conv.__class__ = Other
    block.mlp.act = nn.ReLU()


def _with_other_biases(block):
    for body, name, bias in ((block.ssm, "out_proj", True), (block.mlp, "fc1", False)):
        layer = getattr(body, name)
        setattr(body, name, Pointwise(layer.in_features, layer.out_features, bias).double())


@pytest.mark.parametrize("change", [_hooked, _adapted, _subclassed, _with_other_biases])
def test_layers_that_are_not_known_are_called(change, block, calls):
    change(block)
    x = torch.randn(2, 5, 4, 16, dtype=torch.float64)
    assert_close(gradients_of(block, x), plain_gradients_of(block, x), 1e-12)
    assert not calls


def test_second_derivatives(block, calls):
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)

    def penalty_gradients():
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad(block(leaf).pow(3).sum(), leaf, create_graph=True)
        parameters = dict(block.named_parameters())
        found = torch.autograd.grad(
            grad.square().sum(), list(parameters.values()), allow_unused=True
        )
        pairs = zip(parameters, found, strict=True)
        return {name: grad for name, grad in pairs if grad is not None}

    with recomputation(False):
        expected = penalty_gradients()
    assert_close(penalty_gradients(), expected, 1e-7)  # A is float32 in any case
    assert len(expected) > 20 and len(calls) == 2  # the last pass, which nobody differentiates


def test_first_derivatives_by_autograd_use_the_weights_of_the_forward_pass(block):
    """Those that ``functional_call`` gave."""
    other, x = new_block(), torch.randn(1, 3, 4, 16, dtype=torch.float64)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    torch.manual_seed(1)
    y = torch.func.functional_call(block, given, (x,))
    weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    loss = (y * weights).sum()
    gradients = torch.autograd.grad(loss, list(given.values()), create_graph=True)
    actual = {name: grad.detach() for name, grad in zip(given, gradients, strict=True)}
    expected = plain_gradients_of(other, x)
    assert_close(actual, {name: expected[name] for name in actual}, 1e-12)


def test_inference_does_not_record(block, monkeypatch):
    monkeypatch.setattr(branches._Branch, "apply", None)
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        block(x)
    torch.func.grad(lambda x: block.eval()(x).sum())(x)
