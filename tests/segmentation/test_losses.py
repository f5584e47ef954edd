"""Losses by key: known limits, values counted by hand, gradients, ignored pixels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spatial_mamba_d2.data.class_indices import IGNORE
from spatial_mamba_d2.segmentation.losses import (
    cross_entropy,
    focal_loss,
    hard_pixel_loss,
    lovasz_loss,
)
from spatial_mamba_d2.segmentation.train import run


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 12, 9, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 12, 9), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE
    return logits, target


def test_limits_are_cross_entropy(batch):
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    for w in (None, weights):
        expected = cross_entropy(*batch, w)
        torch.testing.assert_close(focal_loss(*batch, w, gamma=0.0), expected)
        counted = (batch[1] != IGNORE).double().mean()
        torch.testing.assert_close(hard_pixel_loss(*batch, w, share=1.0) * counted, expected)


def test_focal_loss_by_hand(batch):
    logits, target = batch
    total = 0.0
    for b, y, x in (target != IGNORE).nonzero().tolist():
        p = logits[b, :, y, x].softmax(0)[target[b, y, x]]
        total += -((1 - p) ** 1.5) * p.log()
    torch.testing.assert_close(focal_loss(*batch, gamma=1.5), total / target.numel())


def test_hard_pixels_by_hand(batch):
    logits, target = batch
    losses = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    kept = []
    for values, labels in zip(losses, target, strict=True):
        number = -(-int((labels != IGNORE).sum()) // 4)
        kept += sorted(values[labels != IGNORE].tolist(), reverse=True)[:number]
    assert float(hard_pixel_loss(*batch, share=0.25)) == pytest.approx(sum(kept) / len(kept))


def test_lovasz_of_certain_predictions_is_iou(batch):
    _, target = batch
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randint(0, 5, target.shape, generator=generator)
    logits = 1000 * F.one_hot(predicted, 5).permute(0, 3, 1, 2).double()
    counted = target != IGNORE
    losses = []
    for k in range(4):
        a, b = (predicted == k) & counted, target == k
        losses.append(1 - (a & b).sum() / (a | b).sum())
    torch.testing.assert_close(lovasz_loss(logits, target), torch.stack(losses).mean())


@pytest.mark.parametrize("loss", [focal_loss, hard_pixel_loss, lovasz_loss])
def test_gradients_and_ignored_pixels(loss, batch):
    logits, target = batch
    x = logits.clone().requires_grad_()
    loss(x, target).backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert not x.grad.permute(0, 2, 3, 1)[target == IGNORE].any()
    nothing = torch.full_like(target, IGNORE)
    y = logits.clone().requires_grad_()
    value = loss(y, nothing)
    value.backward()
    assert value == 0 and not y.grad.any()
    perfect = 50 * F.one_hot(torch.where(target == IGNORE, 0, target), 5).permute(0, 3, 1, 2)
    assert loss(perfect.double(), target) < 1e-6


@pytest.mark.parametrize(
    "keys",
    [("MODEL.PIXEL_LOSS", "focal"), ("MODEL.PIXEL_LOSS", "ohem", "MODEL.LOVASZ_WEIGHT", 0.5)],
)
def test_trainings_by_key(keys, arguments, curve, tmp_path):
    scores = run(arguments(*keys, "SOLVER.MAX_ITER", 3, "SOLVER.LOG_PERIOD", 1))
    assert scores["mIoU"] >= 0
    losses = curve(tmp_path / "output")
    assert len(losses) == 3 and all(value > 0 for value in losses.values())
    if "MODEL.LOVASZ_WEIGHT" in keys:
        assert curve(tmp_path / "output", "loss_lovasz")


def test_keys_are_checked(arguments):
    for key, value in (
        ("MODEL.PIXEL_LOSS", "hinge"),
        ("MODEL.OHEM_SHARE", 0),
        ("MODEL.FOCAL_GAMMA", -1),
    ):
        with pytest.raises(ValueError, match=key):
            run(arguments(key, value))
