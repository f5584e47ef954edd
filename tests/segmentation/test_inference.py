"""Whole, sliding and multi-scale inference agree where they must."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spatial_mamba_d2.data.segmentation_transforms import TestTransform
from spatial_mamba_d2.models import build_upernet
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.inference import build_protocol, segment, slide, whole

SS = build_protocol(load_config(None))
MEAN_STD = ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_upernet(
        "tiny", 5, embed_dim=16, depths=(1, 1, 1, 1), channels=8, aux_channels=8
    ).eval()


@torch.no_grad()
def test_a_window_as_large_as_the_image_is_the_whole(model):
    x = torch.randn(1, 3, 60, 84)
    expected = whole(model, x)
    for crop_px in (84, 500):
        assert torch.equal(slide(model, x, crop_px, 40), expected)


@pytest.mark.parametrize("crop_px, stride_px", [(32, 20), (32, 32), (50, 1), (60, 33)])
def test_windows_cover_every_pixel_and_are_averaged(crop_px, stride_px):
    """A model without context gives the same by windows as at once."""

    def pointwise(x):
        return torch.cat([x, 2 * x], dim=1)

    x = torch.randn(1, 3, 57, 71)
    result = slide(pointwise, x, crop_px, stride_px)
    torch.testing.assert_close(result, pointwise(x), rtol=1e-5, atol=1e-5)


def test_windows_are_those_of_mmsegmentation():
    seen = []

    def record(x):
        seen.append(tuple(x[0, :2, 0, 0].int().tolist()) + x.shape[-2:])
        return x

    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(70), indexing="ij")
    slide(record, torch.stack([rows, columns, rows])[None].float(), 64, 42)
    assert seen == [(0, 0, 64, 64), (0, 6, 64, 64), (36, 0, 64, 64), (36, 6, 64, 64)]


@torch.no_grad()
def test_multi_scale_of_one_scale_is_single_scale(model):
    """The same prediction from averaged probabilities as from logits."""
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    (view,) = TestTransform(64, 256, (1.0,), *MEAN_STD)(image)
    single = segment(model, [view], (50, 70), SS)
    custom = build_protocol(load_config(None, ["TEST.PROTOCOL", "custom"]))
    assert (custom.scales, custom.flip) == ((1.0,), False)
    assert torch.equal(segment(model, [view], (50, 70), custom), single)
    averaged = segment(model, [view, view], (50, 70), SS)
    torch.testing.assert_close(averaged, single.softmax(0), rtol=0, atol=1e-6)
    assert torch.equal(averaged.argmax(0), single.argmax(0))


@torch.no_grad()
def test_multi_scale_and_flip_average_probabilities(model):
    """Against the definition, written out."""
    image = np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8)
    protocol = build_protocol(load_config(None, ["TEST.PROTOCOL", "ms"]))
    assert protocol.scales == (0.75, 1.0, 1.25) and protocol.flip
    views = TestTransform(64, 256, protocol.scales, *MEAN_STD, protocol.scales_of)(image)
    assert [tuple(v.shape) for v in views] == [(3, 38, 53), (3, 50, 70), (3, 63, 88)]
    probabilities = []
    for view in views:
        for mirrored in (False, True):
            x = view[None].flip(-1) if mirrored else view[None]
            logits = F.interpolate(model(x), x.shape[-2:], mode="bilinear")
            logits = logits.flip(-1) if mirrored else logits
            logits = F.interpolate(logits, (50, 70), mode="bilinear")
            probabilities.append(logits.softmax(1)[0])
    expected = torch.stack(probabilities).mean(0)
    torch.testing.assert_close(
        segment(model, views, (50, 70), protocol), expected, rtol=0, atol=1e-6
    )


def test_scales_of_the_frame_and_of_the_image():
    """0.75 of a short side of 64 is 48; of a short side of 50 it is 37.5, rounded up."""
    image = np.zeros((50, 70, 3), np.uint8)
    for scales_of, sizes in {
        "frame": [(3, 48, 67), (3, 64, 90), (3, 80, 112)],
        "image": [(3, 38, 53), (3, 50, 70), (3, 63, 88)],
    }.items():
        keys = ["TEST.PROTOCOL", "custom", "TEST.SCALES", "(0.75, 1, 1.25)"]
        protocol = build_protocol(load_config(None, [*keys, "TEST.SCALES_OF", scales_of]))
        transform = TestTransform(64, 256, protocol.scales, *MEAN_STD, protocol.scales_of)
        assert [tuple(view.shape) for view in transform(image)] == sizes


@torch.no_grad()
def test_flip_makes_predictions_symmetric(model):
    view = torch.rand(3, 48, 64)
    protocol = dataclasses.replace(SS, flip=True)
    scores = segment(model, [view], (48, 64), protocol)
    mirrored = segment(model, [view.flip(-1)], (48, 64), protocol)
    torch.testing.assert_close(mirrored.flip(-1), scores, rtol=0, atol=1e-5)


def test_the_protocol_says_all():
    text = str(build_protocol(load_config(None, ["TEST.PROTOCOL", "ms", "TEST.MODE", "slide"])))
    assert text == (
        "ms (slide, crop 512, stride 341; scales 0.75, 1.0, 1.25 of the image; with flip; "
        "OpenCV bilinear; stored labels 0 ignored)"
    )
    assert str(SS) == (
        "ss (whole; scales 1.0 of short side 512, long <= 2048; OpenCV bilinear; "
        "stored labels 0 ignored)"
    )


def test_no_view_is_named(model):
    with pytest.raises(ValueError, match="at least one view, got none"):
        segment(model, [], (4, 4), SS)
