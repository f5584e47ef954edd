"""Linear layers over maps against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spatial_mamba_d2.models import pointwise as pointwise_module
from spatial_mamba_d2.models.pointwise import Pointwise, pointwise

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "shape",
    # small; a convolution of merged images in float32; of separate ones in both
    [(1, 1, 1, 5), (2, 7, 1, 16), (1, 9, 13, 33), (2, 30, 29, 120), (2, 35, 33, 80)],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_a_linear_layer(monkeypatch, shape, dtype, bias):
    monkeypatch.setattr(pointwise_module, "linear_layers_keep_up", lambda: False)
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(16, shape[-1])] + [torch.randn(16)] * bias
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    cotangent = torch.randn(*shape[:-1], 16).to(dtype)
    outputs = [function(*inputs) for function in (pointwise, F.linear)]
    gradients = [torch.autograd.grad(output, inputs, cotangent) for output in outputs]
    assert outputs[0].is_contiguous() and outputs[0].dtype == dtype
    for actual, expected in zip(
        (outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True
    ):
        tolerance = TOLERANCES[dtype] * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture
def convolved(monkeypatch):
    """Shapes of what is convolved."""
    shapes = []

    def conv2d(x, *others):
        shapes.append(tuple(x.shape))
        return torch.conv2d(x, *others)

    monkeypatch.setattr(F, "conv2d", conv2d)
    return shapes


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((1, 8, 8, 256), torch.float32, None),
        ((1, 8, 9, 256), torch.float32, (1, 256, 8, 9)),
        ((4, 32, 32, 256), torch.float32, (1, 256, 128, 32)),
        ((4, 32, 33, 256), torch.float32, (4, 256, 32, 33)),
        ((4, 16, 16, 256), torch.bfloat16, None),
        ((4, 16, 17, 256), torch.bfloat16, (1, 256, 64, 17)),
        ((1, 8, 8, 256), torch.float64, None),
        ((1, 64, 64, 256), torch.float64, None),
    ],
    ids=str,
)
def test_small_products_are_linear_layers_and_small_maps_one_image(
    monkeypatch, convolved, shape, dtype, expected
):
    """Of a weight of 64 x 256, where linear layers are slow."""
    monkeypatch.setattr(pointwise_module, "linear_layers_keep_up", lambda: False)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(64, 256, dtype=dtype)
    assert pointwise(x, weight).shape == (*shape[:-1], 64)
    assert convolved == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("num_threads", "height", "outputs", "dtype", "is_convolved"),
    [
        (2, 64, 64, torch.float32, False),
        (2, 65, 64, torch.float32, True),
        (2, 65, 15, torch.float32, False),
        (1, 65, 64, torch.float32, False),
        (1, 65, 16, torch.bfloat16, True),
        (1, 65, 15, torch.bfloat16, False),
    ],
)
def test_where_linear_layers_keep_up(
    monkeypatch, convolved, num_threads, height, outputs, dtype, is_convolved
):
    monkeypatch.setattr(pointwise_module, "linear_layers_keep_up", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    x, weight = torch.randn(1, height, 64, 256).to(dtype), torch.randn(outputs, 256).to(dtype)
    y = pointwise(x, weight)
    assert convolved == [(1, 256, height, 64)] * is_convolved
    expected = F.linear(x.double(), weight.double()).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=1e-3 * expected.abs().max().item())


def test_parts_of_a_map(monkeypatch):
    """A slice of channels and a transposed map, as they come out of a split."""
    monkeypatch.setattr(pointwise_module, "linear_layers_keep_up", lambda: False)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, 12)
    layer = Pointwise(4, 9)
    for products in (2**20, 0):  # as linear layers, and as convolutions
        monkeypatch.setattr(pointwise_module, "LINEAR_PRODUCTS", products)
        for part in (x[..., 3:7], x.transpose(1, 2)[..., 8:], x[:, ::2, 1:, :4]):
            torch.testing.assert_close(layer(part), F.linear(part, layer.weight, layer.bias))


def test_autocast():
    layer = Pointwise(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 3, 3, 4)).dtype == torch.bfloat16


class Scaled(torch.Tensor):
    """A weight that consists of other tensors, as quantised ones do, and knows linear layers."""

    @staticmethod
    def __new__(cls, weight, scale):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=torch.float32)

    def __init__(self, weight, scale):
        self.weight, self.scale = weight, scale

    def __tensor_flatten__(self):
        return ["weight"], self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.weight * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].weight, args[0].scale)
        raise NotImplementedError(func)


def test_weights_that_quantisers_put_in_place():
    layer, x = Pointwise(4, 9), torch.randn(1, 3, 5, 4)
    expected = F.linear(x, layer.weight * 2, layer.bias)
    layer.weight = torch.nn.Parameter(Scaled(layer.weight.detach(), 2), requires_grad=False)
    torch.testing.assert_close(layer(x), expected)
