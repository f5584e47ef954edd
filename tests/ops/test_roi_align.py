"""RoIAlign of channels-last maps, and its gradients."""

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


@pytest.mark.parametrize("options", [(0, True), (3, False)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_the_reference(shape, dtype, options):
    *size, rows, columns = shape
    x, boxes = inputs(*size, dtype)
    grad = torch.randn(len(boxes), rows, columns, size[-1], dtype=torch.float64).to(dtype)

    leaves = [x.clone().requires_grad_(), boxes.clone().requires_grad_()]
    ops.roi_align(*leaves, rows, columns, 0.25, *options).backward(grad)
    of_x, of_boxes = (leaf.grad for leaf in leaves)
    precise = x.double().requires_grad_()
    pooled = reference.roi_align(precise, boxes.double(), rows, columns, 0.25, *options)
    (expected,) = torch.autograd.grad(pooled, precise, grad.double())
    assert of_x.shape == x.shape and of_x.dtype == dtype and of_x.is_contiguous()
    assert relative_error(of_x, expected) <= 4 * TOLERANCE[dtype]
    assert not of_boxes.any()


@pytest.mark.parametrize("options", [(0, True), (2, True), (0, False)], ids=str)
def test_against_torchvision(options):
    x, boxes = inputs(12, 20, 33)
    boxes = boxes[(boxes[:, 3:] >= boxes[:, 1:3]).all(dim=1)]  # what torchvision refuses
    x.requires_grad_()
    actual = ops.roi_align(x, boxes, 7, 7, 0.25, *options)
    expected = torchvision.ops.roi_align(x.permute(0, 3, 1, 2), boxes, 7, 0.25, *options)
    torch.testing.assert_close(actual.permute(0, 3, 1, 2), expected, rtol=1e-5, atol=2e-6)
    grad = torch.randn(expected.shape)
    (expected,) = torch.autograd.grad(expected, x, grad)
    (actual,) = torch.autograd.grad(actual, x, grad.permute(0, 2, 3, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


def test_strided_inputs(strided):
    x, boxes = inputs(9, 7, 5)
    x.requires_grad_()
    expected = ops.roi_align(x, boxes, 3, 4, 0.25)
    actual = ops.roi_align(strided(x), strided(boxes), 3, 4, 0.25)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn(expected.shape)
    of_x = [torch.autograd.grad(y, x, g)[0] for y, g in ((expected, grad), (actual, strided(grad)))]
    torch.testing.assert_close(*of_x)
    x = x.detach()
    rows = torch.randn(2, 9, 7, 12)[..., 3:8].copy_(x)  # evenly spaced
    torch.testing.assert_close(ops.roi_align(rows, boxes, 3, 4, 0.25), expected)


def test_number_of_threads_changes_nothing(kernels):
    x, boxes = inputs(19, 17, 40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            pooled = ops.roi_align(x.requires_grad_(), boxes, 7, 7, 0.25)
            results.append((pooled, *torch.autograd.grad(pooled.square().sum(), x)))
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-5 if kernels == "eager" else 0
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=tolerance, atol=tolerance)


def test_no_boxes_and_no_numbers():
    x, boxes = inputs(9, 7, 5)
    none = ops.roi_align(x.requires_grad_(), boxes[:0], 3, 4, 0.25)
    assert none.shape == (0, 3, 4, 5)
    assert torch.equal(*torch.autograd.grad(none.sum(), x), torch.zeros_like(x))
    boxes[1, 2], boxes[2, 4] = torch.nan, 1e10
    pooled = ops.roi_align(x, boxes, 3, 4, 0.25)
    assert pooled[1:3].isnan().all() and pooled[3:].isfinite().all() and pooled[0].isfinite().all()
    others = ops.roi_align(x, boxes[[0, *range(3, len(boxes))]], 3, 4, 0.25)
    torch.testing.assert_close(
        *torch.autograd.grad(pooled.sum(), x), *torch.autograd.grad(others.sum(), x)
    )


@pytest.mark.parametrize("number", [0, 30])
def test_opcheck(number):
    x, boxes = inputs(9, 7, 5)
    torch.library.opcheck(
        torch.ops.spatial_mamba.roi_align.default,
        (x.requires_grad_(), boxes[:number], 3, 4, 0.25, 0, True),
    )


def test_other_derivatives():
    x, boxes = inputs(5, 4, 3, torch.float64)

    def pool(x):
        return ops.roi_align(x, boxes, 2, 3, 0.25)

    torch.autograd.gradgradcheck(pool, x.clone().requires_grad_())
    if torch.__version__ < (2, 9):
        pytest.skip("PyTorch 2.8 has no Tensor.tolist under torch.func")
    direction = torch.randn_like(x)
    pooled, tangent = torch.func.jvp(pool, (x,), (direction,))
    torch.testing.assert_close(pooled, pool(x))
    torch.testing.assert_close(tangent, pool(direction))  # the operator is linear
    mapped = torch.func.vmap(pool)(torch.stack((x, direction)))
    torch.testing.assert_close(mapped, torch.stack((pool(x), pool(direction))))


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
