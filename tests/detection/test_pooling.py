"""Poolers on CPUs compute what Detectron2's do, with gradients, and training uses them."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn

from spatial_mamba_d2.detection.pooling import (
    ChannelsLastPooler,
    FastPooler,
    become,
    use_fast_pooling,
)
from spatial_mamba_d2.detection.step import AccumulatingTrainer
from spatial_mamba_d2.ops import _extension

SCALES = (1 / 4, 1 / 8, 1 / 16)

pytestmark = pytest.mark.skipif(
    _extension.WHY_NOT_COMPILED is not None, reason=f"{_extension.WHY_NOT_COMPILED}"
)


def pooler(kind="ROIAlignV2"):
    return ROIPooler(7, scales=SCALES, sampling_ratio=0, pooler_type=kind)


def features(channels=5, **options):
    return [
        torch.randn(2, channels, int(128 * s), int(160 * s), **options).requires_grad_()
        for s in SCALES
    ]


def random_boxes(number, size):
    corners = torch.rand(number, 2) * 120
    return Boxes(torch.cat((corners, corners + torch.rand(number, 2) * size + 1), dim=1))


@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign"])
def test_the_same_values_and_gradients(kind):
    torch.manual_seed(0)
    theirs, x = pooler(kind), features()
    ours = copy.deepcopy(theirs)
    use_fast_pooling(ours)
    assert type(ours) is FastPooler and type(theirs) is ROIPooler
    boxes = [random_boxes(30, 200), random_boxes(11, 900)]
    expected, found = theirs(x, boxes), ours(x, boxes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous()
    channels_last = copy.deepcopy(ours)
    assert become(channels_last, ChannelsLastPooler)
    assert torch.equal(channels_last(x, boxes), found)
    grad = torch.randn(expected.shape)
    gradients = [torch.autograd.grad(y, x, grad) for y in (found, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [1, 3])
def test_boxes_of_no_level(levels):
    """Their squares are not numbers; with several levels, Detectron2 leaves zeros."""
    torch.manual_seed(0)
    theirs = ROIPooler(7, scales=SCALES[:levels], sampling_ratio=0, pooler_type="ROIAlignV2")
    ours, x = copy.deepcopy(theirs), features()[:levels]
    use_fast_pooling(ours)
    boxes = [random_boxes(3, 200), Boxes(torch.tensor([[10.0, 10, 5, 20], [9, 9, 50, 40]]))]
    if levels == 1:  # torchvision refuses the first, which has no width in ours
        pooled = ours(x, boxes)
        assert not pooled[3].isnan().any()
        boxes[1] = boxes[1][1:]
        torch.testing.assert_close(ours(x, boxes), theirs(x, boxes), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(ours(x, boxes), theirs(x, boxes), rtol=1e-5, atol=1e-5)


def test_batches_without_images_and_of_other_lengths():
    theirs, x = pooler(), [f[:0] for f in features()]
    ours = copy.deepcopy(theirs)
    use_fast_pooling(ours)
    assert ours(x, []).shape == theirs(x, []).shape
    with pytest.raises(ValueError, match="one list per image, 2, got 1"):
        ours(features(), [random_boxes(3, 90)])


def test_images_without_boxes():
    ours, x = pooler(), features()
    use_fast_pooling(ours)
    pooled = ours(x, [Boxes(torch.zeros(0, 4)), Boxes(torch.zeros(0, 4))])
    assert pooled.shape == (0, 5, 7, 7)
    assert not any(grad.any() for grad in torch.autograd.grad(pooled.sum(), x))


def test_bfloat16():
    torch.manual_seed(0)
    theirs, x = pooler(), [f.detach() for f in features()]
    ours = copy.deepcopy(theirs)
    use_fast_pooling(ours)
    boxes = [random_boxes(9, 200), random_boxes(9, 200)]
    found = ours([f.bfloat16() for f in x], boxes)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), theirs(x, boxes), rtol=0.02, atol=0.03)


def test_training_under_autocast():
    """Maps of a convolution, which are bfloat16 then; boxes keep float32."""
    torch.manual_seed(0)
    theirs, x = pooler(), features(8)
    ours = copy.deepcopy(theirs)
    use_fast_pooling(ours)
    conv = nn.Conv2d(8, 6, 1)
    boxes = [random_boxes(9, 200), random_boxes(9, 200)]
    expected = theirs([conv(f) for f in x], boxes)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours([conv(f) for f in x], boxes)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.05)
    grad = torch.randn(expected.shape)
    (actual,) = torch.autograd.grad(found, conv.weight, grad.bfloat16())
    (wanted,) = torch.autograd.grad(expected, conv.weight, grad)
    assert (actual - wanted).norm() < 0.02 * wanted.norm()


def test_other_poolers_stay():
    class Other(ROIPooler):
        pass

    other = Other(7, scales=SCALES, sampling_ratio=0, pooler_type="ROIAlignV2")
    model = nn.Sequential(pooler("ROIPool"), other)
    use_fast_pooling(model)
    assert [type(m) for m in model] == [ROIPooler, Other]


def test_training_uses_them():
    model = nn.ModuleDict({"pooler": pooler(), "layer": nn.Linear(1, 1)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    AccumulatingTrainer(model, [], optimizer, device="cpu")
    assert type(model["pooler"]) is FastPooler
