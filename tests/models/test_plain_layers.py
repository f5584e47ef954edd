"""Layers that are computed without a call of their module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

from spatial_mamba_d2.models.plain_layers import is_plain
from spatial_mamba_d2.models.pointwise import Pointwise


def do_nothing(*_: object) -> None:
    """A hook of any kind."""


def test_a_layer_as_it_is_built():
    assert is_plain(Pointwise(3, 4), Pointwise)
    assert is_plain(Pointwise(3, 4, bias=False), Pointwise)
    assert is_plain(nn.Linear(3, 4), nn.Linear)
    assert is_plain(Pointwise(3, 4).eval().requires_grad_(False), Pointwise)


def test_another_type_is_not():
    assert not is_plain(Pointwise(3, 4), nn.Linear)  # a subclass
    assert not is_plain(nn.Linear(3, 4), Pointwise)
    assert not is_plain(nn.Identity(), Pointwise)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_backward_hook",
    ],
)
def test_hooks_of_the_layer(register):
    layer = Pointwise(3, 4)
    handle = getattr(layer, register)(do_nothing)
    assert not is_plain(layer, Pointwise)
    handle.remove()
    assert is_plain(layer, Pointwise)


@pytest.mark.parametrize(
    "register",
    [
        "register_module_forward_hook",
        "register_module_forward_pre_hook",
        "register_module_full_backward_hook",
        "register_module_full_backward_pre_hook",
    ],
)
def test_hooks_of_all_layers(register):
    layer = Pointwise(3, 4)
    handle = getattr(every_module, register)(do_nothing)
    try:
        assert not is_plain(layer, Pointwise)
    finally:
        handle.remove()
    assert is_plain(layer, Pointwise)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 2),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_weights_that_are_computed(change):
    layer = Pointwise(3, 4)
    change(layer)
    assert not is_plain(layer, Pointwise)


def test_a_weight_of_several_tensors():
    layer = Pointwise(3, 4)
    layer.weight = nn.Parameter(TwoTensor(torch.zeros(4, 3), torch.zeros(4, 3)))
    assert not is_plain(layer, Pointwise)


def test_a_replaced_forward():
    layer = Pointwise(3, 4)
    layer.forward = lambda x: 2 * x  # type: ignore[method-assign]
    assert not is_plain(layer, Pointwise)


def test_weights_of_one_call():
    """``torch.func.functional_call`` passes plain tensors, which the layer has for the call."""
    seen = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Pointwise(3, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(is_plain(self.layer, Pointwise))
            return x @ self.layer.weight.T

    weights = {"layer.weight": torch.ones(4, 3)}
    y = torch.func.functional_call(Model(), weights, torch.ones(2, 3))
    assert seen == [True] and torch.equal(y, torch.full((2, 4), 3.0))


def test_compiled_code_asks_as_well():
    layer = Pointwise(3, 4)

    @torch.compile(backend="eager", fullgraph=True)
    def answer(x: Tensor) -> Tensor:
        return x + 1 if is_plain(layer, Pointwise) else x

    zero = torch.zeros(())
    assert answer(zero) == 1
    layer.register_forward_hook(do_nothing)
    assert answer(zero) == 0
