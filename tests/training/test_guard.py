"""What ends an iteration: numbers that are not finite, and signals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from spatial_mamba_d2.training.guard import (
    IterationGuard,
    clip_norm,
    gradient_norm,
    reduce_max,
    require_finite_weights,
)

CPU = torch.device("cpu")
GOOD, NAN, INF = torch.tensor(1.5), torch.tensor(float("nan")), torch.tensor(float("inf"))


def guard(checkpoint=None, scale=None):
    return IterationGuard(lambda: checkpoint, lambda: scale, CPU)


def test_finite_numbers_pass():
    guard().check(0, {"loss": GOOD, "loss_mask": GOOD}, GOOD, 0.1)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_named(bad):
    message = (
        r"diverged at iteration 7: not finite: loss_mask; losses: loss 1.5, loss_mask -?(nan|inf); "
        r"norm of the gradients 1.5; learning rate 0.1. Last good checkpoint: out/last.ckpt"
    )
    with pytest.raises(FloatingPointError, match=message):
        guard(Path("out/last.ckpt")).check(7, {"loss": GOOD, "loss_mask": bad}, GOOD, 0.1)


def test_gradients_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="not finite: the norm of .*checkpoint: none"):
        guard().check(7, {"loss": GOOD}, NAN, 0.1)


def test_float16_may_overflow_until_its_scale_is_1():
    guard(scale=2.0).check(7, {"loss": GOOD}, INF, 0.1)
    with pytest.raises(FloatingPointError, match="the norm of the gradients.*scale of the loss 1"):
        guard(scale=1.0).check(7, {"loss": GOOD}, INF, 0.1)
    with pytest.raises(FloatingPointError, match="not finite: loss;"):
        guard(scale=2.0).check(7, {"loss": NAN}, INF, 0.1)


def test_gradient_norm_is_of_all_together():
    network = nn.Linear(2, 1)
    assert gradient_norm(network.parameters()) == 0
    assert gradient_norm(nn.Linear(2, 1, device="meta").parameters()).device.type == "meta"
    network.weight.grad, network.bias.grad = torch.tensor([[1.0, 2.0]]), torch.tensor([2.0])
    assert gradient_norm(network.parameters()) == 3


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0, 1.0, 2.5, 4.0])
def test_gradients_are_clipped_as_pytorch_does(max_norm, norm_type):
    ours, theirs = nn.Linear(2, 1), nn.Linear(2, 1)
    for network in (ours, theirs):
        network.weight.grad = torch.tensor([[1.0, 2.0]])
        network.bias.grad = torch.tensor([2.0])
    before = ours.weight.grad._version
    norm = clip_norm(ours.parameters(), max_norm, norm_type)
    assert (ours.weight.grad._version == before) == (not max_norm or norm <= max_norm)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf, norm_type)
    assert torch.equal(norm, expected) and norm == (3 if norm_type == 2 else 2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_gradients_that_are_not_finite_stay_so():
    network = nn.Linear(1, 1)
    network.weight.grad, network.bias.grad = torch.tensor([[math.nan]]), torch.tensor([1.0])
    assert clip_norm(network.parameters(), 1.0).isnan()
    assert network.weight.grad.isnan().all()


def test_one_process_reduces_to_its_own():
    assert reduce_max(15, torch.tensor([0, 1], dtype=torch.int32)) == [15, 0, 1]
    assert guard().device == CPU


def test_the_check_fetches_from_the_device_once(monkeypatch):
    """With several processes too: the numbers themselves are only fetched for the message."""
    fetched, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: fetched.append(len(t)) or tolist(t))
    guard().check(0, {"loss": GOOD, "loss_mask": GOOD}, GOOD, 0.1)
    assert fetched == [3]


def test_weights_that_are_not_finite_are_named():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    require_finite_weights(network.state_dict(), "weights")
    with torch.no_grad():
        network[0].weight.fill_(3e38)  # finite, although their norm is not
        require_finite_weights(network.state_dict(), "weights")
        network[1].running_var[1] = float("nan")
    with pytest.raises(FloatingPointError, match="last: 1 tensors .*such as 1.running_var"):
        require_finite_weights(network.state_dict(), "last")
