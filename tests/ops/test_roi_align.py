"""RoIAlign of channels-last maps, for inference."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torchvision

from spatial_mamba_d2 import ops
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.roi_align import reference

from .conftest import TOLERANCE, relative_error

# Height, width, channels of the map; rows and columns of bins
SHAPES = [
    (1, 1, 3, 2, 2),
    (1, 9, 17, 7, 7),
    (13, 1, 5, 3, 4),
    (12, 20, 33, 7, 5),
    (9, 8, 70, 14, 14),
]


@pytest.fixture(params=["eager", "native"], autouse=True)
def kernels(request):
    if request.param == "native" and _extension.WHY_NOT_COMPILED:
        pytest.skip(f"no compiled kernels: {_extension.WHY_NOT_COMPILED}")
    eager = request.param == "eager"
    with _extension.without_compiled_kernels() if eager else nullcontext():
        yield request.param


def inputs(height, width, dim, dtype=torch.float32):
    """A map of two images at a quarter of their size, and boxes of all kinds."""
    g = torch.Generator().manual_seed(height * width + dim)
    x = torch.randn(2, height, width, dim, generator=g, dtype=torch.float64)
    size = torch.tensor([width, height], dtype=torch.float64) * 4
    corners = torch.rand(24, 2, generator=g, dtype=torch.float64) * size
    sides = torch.rand(24, 2, generator=g, dtype=torch.float64) * size
    numbers = torch.arange(24, dtype=torch.float64)[:, None] % 2
    boxes = torch.cat((numbers, corners, corners + sides), dim=1)
    special = [
        [0, -50, -60, 30, 20],  # above and left of the image
        [1, 4 * width - 3, 4 * height - 3, 4 * width + 90, 4 * height + 80],
        [0, -90, -90, -50, -50],  # outside
        [1, 3, 3, 3, 3],  # without a side
        [0, 7, 5, 2, 3],  # with negative sides
        [1, 0, 0, 4 * width, 4 * height],
    ]
    boxes = torch.cat((boxes, torch.tensor(special, dtype=torch.float64)))
    return x.to(dtype), boxes.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("options", [(0, True), (2, True), (0, False), (3, False)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape, dtype, options):
    *size, rows, columns = shape
    x, boxes = inputs(*size, dtype)
    actual = ops.roi_align(x, boxes, rows, columns, 0.25, *options)
    expected = reference.roi_align(x.double(), boxes.double(), rows, columns, 0.25, *options)
    assert actual.shape == expected.shape and actual.dtype == dtype and actual.is_contiguous()
    # Positions are float32 as well: an error of 1e-6 of the map's side is one of its slope.
    assert relative_error(actual, expected) <= 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("options", [(0, True), (2, True), (0, False)], ids=str)
def test_against_torchvision(options):
    x, boxes = inputs(12, 20, 33)
    boxes = boxes[(boxes[:, 3:] >= boxes[:, 1:3]).all(dim=1)]  # what torchvision refuses
    actual = ops.roi_align(x, boxes, 7, 7, 0.25, *options)
    expected = torchvision.ops.roi_align(x.permute(0, 3, 1, 2), boxes, 7, 0.25, *options)
    torch.testing.assert_close(actual.permute(0, 3, 1, 2), expected, rtol=1e-5, atol=2e-6)


def test_strided_inputs(strided):
    x, boxes = inputs(9, 7, 5)
    expected = ops.roi_align(x, boxes, 3, 4, 0.25)
    actual = ops.roi_align(strided(x), strided(boxes), 3, 4, 0.25)
    torch.testing.assert_close(actual, expected)
    rows = torch.randn(2, 9, 7, 12)[..., 3:8].copy_(x)  # evenly spaced
    torch.testing.assert_close(ops.roi_align(rows, boxes, 3, 4, 0.25), expected)


def test_number_of_threads_changes_nothing(kernels):
    x, boxes = inputs(19, 17, 40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.roi_align(x, boxes, 7, 7, 0.25))
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-5 if kernels == "eager" else 0
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=tolerance)


def test_no_boxes_and_no_numbers():
    x, boxes = inputs(9, 7, 5)
    assert ops.roi_align(x, boxes[:0], 3, 4, 0.25).shape == (0, 3, 4, 5)
    boxes[1, 2], boxes[2, 4] = torch.nan, torch.inf
    pooled = ops.roi_align(x, boxes, 3, 4, 0.25)
    assert pooled[1:3].isnan().all() and pooled[3:].isfinite().all() and pooled[0].isfinite().all()


def test_opcheck():
    x, boxes = inputs(9, 7, 5)
    torch.library.opcheck(
        torch.ops.spatial_mamba.roi_align.default, (x, boxes, 3, 4, 0.25, 0, True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_gradients_are_refused():
    x, boxes = inputs(9, 7, 5)
    with pytest.raises(RuntimeError, match="roi_align has no gradients"):
        ops.roi_align(x.requires_grad_(), boxes, 3, 4, 0.25).sum().backward()
    with pytest.raises(RuntimeError, match="roi_align has no gradients"):
        torch.func.vmap(lambda x: ops.roi_align(x, boxes, 3, 4, 0.25))(x.detach()[None])


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x": torch.ones(3, 4, 5)}, r"x must be \[B, H, W, C\]"),
        ({"boxes": torch.ones(3, 4)}, r"boxes must be \[N, 5\] = \[3, 5\], got \[3, 4\]"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"boxes": torch.tensor([[2.0, 0, 0, 4, 4]])}, "of images 0 to 1, got 2"),
        ({"boxes": torch.tensor([[-1.0, 0, 0, 4, 4]])}, "of images 0 to 1, got -1"),
    ],
)
def test_bad_arguments_are_named(replaced, message):
    x, boxes = inputs(9, 7, 5)
    arguments = {"x": x, "boxes": boxes, "height": 3, "width": 4, "scale": 0.25, **replaced}
    with pytest.raises(ValueError, match=message):
        ops.roi_align(**arguments)
