"""What autograd keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from spatial_mamba_d2.models import build_classifier
from spatial_mamba_d2.profiling.memory import (
    peak_memory_mb,
    reset_peak_memory_mb,
    saved_bytes,
    saved_bytes_by_module,
)


def test_each_storage_counts_once_and_weights_do_not():
    layer = nn.Linear(8, 8)
    x = torch.randn(100, 8)

    def run():
        y = layer(x)  # saves x, and the weight
        return (y * y[:50].repeat(2, 1)).exp()  # saves y, the repeated half and the result

    assert saved_bytes(layer, run) == 4 * x.nbytes


def test_empty_storages_are_not_taken_for_each_other():
    """All of them have the address 0, as everything on ``meta``."""
    scale = nn.Parameter(torch.ones(0))
    module = nn.ParameterList([scale])
    for device in ("cpu", "meta"):
        x = torch.ones(5, device=device, requires_grad=True)
        assert saved_bytes(module, lambda x=x: (x.exp(), x.sin())) == 2 * x.nbytes  # exp(x), x


def test_by_module():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU()), nn.Linear(8, 2))
    x = torch.ones(3, 4)
    found = saved_bytes_by_module(model, lambda: model(x).square())
    # ReLU saves its result first, which the last layer uses; the square is outside of the model.
    assert found == {"0": x.nbytes, "1.0": 4 * 3 * 8, "": 4 * 3 * 2}
    assert not model._forward_hooks and not model[0]._forward_pre_hooks


def test_hooks_are_removed_after_an_error():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with pytest.raises(RuntimeError):
        saved_bytes(model, lambda: model(torch.ones(3, 5)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gradients_are_not_changed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    gradients = []

    def step():
        model.zero_grad()
        model(x).exp().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])

    step()
    saved_bytes(model, step)
    for plain, counted in zip(*gradients, strict=True):
        assert torch.equal(plain, counted)


class Packed(nn.Module):
    """Keeps what it saves in bfloat16, and reports that to the hooks around it."""

    def forward(self, x):
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        pack, unpack = outer or (lambda tensor: tensor,) * 2

        def pack_half(tensor):
            return pack(tensor.bfloat16()), tensor.dtype

        def unpack_half(packed):
            return unpack(packed[0]).to(packed[1])

        with saved_tensors_hooks(pack_half, unpack_half):
            return x.exp()


def test_hooks_of_a_module_pass_on_what_they_keep():
    x = torch.randn(100, requires_grad=True)
    model = Packed()
    assert saved_bytes(model, lambda: model(x)) == x.nbytes // 2
    expected = x.exp().bfloat16().float()

    def backward():
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        assert torch.equal(gradient, expected)

    saved_bytes(model, backward)


def test_shapes_alone_suffice():
    """The same bytes as with numbers in the tensors."""
    found = []
    for device in ("cpu", "meta"):
        model = build_classifier("tiny", embed_dim=16, depths=(1, 1, 1, 1)).to(device).train()
        images = torch.zeros(2, 3, 40, 50, device=device)
        found.append(saved_bytes_by_module(model, lambda model=model, images=images: model(images)))
    assert found[0] == found[1]


def test_the_peak_of_this_process():
    before = reset_peak_memory_mb()
    if before is None:
        pytest.skip("the peak cannot be reset here: that takes Linux and a writable /proc")
    block = torch.ones(50_000_000, dtype=torch.uint8)
    del block
    assert 45 < peak_memory_mb() - before < 100
