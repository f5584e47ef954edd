"""Predictions of large images: the same as from all scores, without holding them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from spatial_mamba_d2.segmentation import large_images
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.inference import build_protocol, segment
from spatial_mamba_d2.segmentation.large_images import predict

SS = build_protocol(load_config(None))
SLIDE = dataclasses.replace(SS, mode="slide", crop_px=32, stride_px=20)
NUM_CLASSES = 7


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, NUM_CLASSES, 7, stride=4, padding=3).requires_grad_(False)
    return lambda x: 5 * conv(x)


@pytest.fixture
def tiny_buffers(monkeypatch):
    monkeypatch.setattr(large_images, "SCORES_BYTES", 1000)
    monkeypatch.setattr(large_images, "STRIP_BYTES", 5000)
    monkeypatch.setattr(large_images, "WINDOWS_BYTES", 100_000)  # several slabs of columns


@pytest.mark.parametrize("protocol", [SS, SLIDE], ids=["whole", "slide"])
@pytest.mark.parametrize("size", [(70, 90), (50, 61), (131, 40), (1, 5)])
def test_small_images_take_the_plain_way(protocol, size, model):
    view = torch.randn(3, 70, 90)
    expected = segment(model, [view], size, protocol).argmax(0)
    actual = predict(model, [view], size, protocol, NUM_CLASSES)
    assert actual.dtype == torch.uint8 and torch.equal(actual.long(), expected)


@pytest.mark.parametrize("size", [(70, 90), (50, 61), (301, 40), (1, 5)])
def test_class_by_class_is_exact(size, model, tiny_buffers):
    view = torch.randn(3, 70, 90)
    expected = segment(model, [view], size, SS).argmax(0)
    assert torch.equal(predict(model, [view], size, SS, NUM_CLASSES).long(), expected)


@pytest.mark.parametrize("crop_px, stride_px", [(32, 20), (32, 32), (90, 9), (200, 200), (40, 7)])
def test_sliding_windows_in_the_size_of_the_image_are_exact(
    crop_px, stride_px, model, tiny_buffers
):
    view = torch.randn(3, 70, 90)
    protocol = dataclasses.replace(SLIDE, crop_px=crop_px, stride_px=stride_px)
    expected = segment(model, [view], (70, 90), protocol).argmax(0)
    assert torch.equal(predict(model, [view], (70, 90), protocol, NUM_CLASSES).long(), expected)


def test_ties_go_to_the_first_class(tiny_buffers):
    def equal(x):
        return torch.zeros(1, NUM_CLASSES, x.shape[2] // 4, x.shape[3] // 4)

    assert not predict(equal, [torch.zeros(3, 40, 40)], (60, 60), SS, NUM_CLASSES).any()


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("size", [(70, 90), (140, 45), (33, 200)])
@pytest.mark.parametrize("num_views", [1, 3])
def test_strips_agree_up_to_rounding(mode, size, num_views, model, tiny_buffers):
    """Where they differ, both classes have almost the same score."""
    protocol = dataclasses.replace(SLIDE, mode=mode, flip=num_views > 1)
    views = [torch.randn(3, 60 + 15 * i, 80 + 9 * i) for i in range(num_views)]
    scores = segment(model, views, size, protocol)
    label = predict(model, views, size, protocol, NUM_CLASSES)
    assert label.shape == size
    best, chosen = scores.max(0).values, scores.gather(0, label[None].long())[0]
    assert (best - chosen).max() < 1e-5
    assert (label.long() == scores.argmax(0)).float().mean() > 0.999


@pytest.mark.parametrize("dim", [1, 2])
def test_parts_of_a_resizing(dim):
    x = torch.randn(2, 23, 23)
    for target in (23, 50, 11, 90, 1):
        size = (target, 23) if dim == 1 else (23, target)
        expected = F.interpolate(x[None], size, mode="bilinear")[0]
        for start in range(0, target, 4):
            wanted = slice(start, min(start + 4, target))
            read = large_images._source_range(23, target, wanted)
            part = x.narrow(dim, read.start, read.stop - read.start)
            actual = large_images._resize(part, dim, read, 23, target, wanted)
            expected_part = expected.narrow(dim, start, wanted.stop - start)
            torch.testing.assert_close(actual, expected_part, rtol=0, atol=1e-5)


MEASURE = """
import dataclasses, re, torch
from spatial_mamba_d2.segmentation import large_images
from spatial_mamba_d2.segmentation.config import load_config
from spatial_mamba_d2.segmentation.inference import build_protocol

large_images.SCORES_BYTES, large_images.STRIP_BYTES = 2**23, 2**21
large_images.WINDOWS_BYTES = 2**24
whole = build_protocol(load_config(None))
slide = dataclasses.replace(whole, mode="slide", crop_px=64, stride_px=48)
weight = torch.randn(150, 1, 1)

def model(x):
    return weight * torch.nn.functional.avg_pool2d(x[:, :1], 4) + weight.flip(0)

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def run(protocol, size, *views):
    views = [torch.randn(3, *view) for view in views]
    label = large_images.predict(model, views, size, protocol, 150)
    assert label.shape == size

run(whole, (64, 64), (64, 64))
before = peak_mb()
flip = dataclasses.replace(slide, flip=True)
for protocol, *views in (
    (whole, (64, 85)),
    (slide, (64, 85)),
    (slide, (400, 540)),
    (flip, (300, 405), (400, 540), (500, 675)),
):
    run(protocol, (400, 540), *views)
    print(peak_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_classes():
    """All scores of 400 x 540 pixels and 150 classes take 130 MB."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert max(map(float, done.stdout.split())) < 105, done.stdout
