"""Second, forward-mode and functional derivatives of the model: right, and never silently 0."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hvp
from torch.func import functional_call, grad, jvp, vmap

from spatial_mamba_d2.models import build_classifier

SMALL = {"embed_dim": 8, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}


@pytest.fixture(scope="module")
def model():
    """Weights large enough that every part matters."""
    torch.manual_seed(0)
    model = build_classifier("tiny", num_classes=3, **SMALL).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 33, 40, dtype=torch.float64)


@pytest.fixture
def loss(model):
    return lambda x: model(x).square().mean()


@pytest.fixture
def loss_of_weights(model):
    return lambda weights, x: functional_call(model, weights, (x,)).square().mean()


def gradient_of(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def gradients_of_weights(model, x):
    loss = model(x).square().mean()
    return dict(
        zip(weights_of(model), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )


def assert_close(actual, expected, tolerance=1e-9):
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= tolerance * largest, name


def test_gradient_penalty(loss, x):
    """Along a direction, against finite differences."""

    def penalty(x):
        return torch.autograd.grad(loss(x), x, create_graph=True)[0].square().sum()

    direction, step = torch.randn_like(x), 1e-6
    ends = [penalty((x + sign * step * direction).requires_grad_()) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    actual = (gradient_of(penalty, x) * direction).sum()
    assert expected.abs() > 1e-6
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def test_hessian_vector_products_agree(loss, x):
    """Reverse over reverse, forward over reverse, and finite differences of gradients."""
    v, step = torch.randn_like(x), 1e-6
    expected = (gradient_of(loss, x + step * v) - gradient_of(loss, x - step * v)) / (2 * step)
    products = {"reverse": hvp(loss, x, v)[1], "functional": jvp(grad(loss), (x,), (v,))[1]}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
        (gradient,) = torch.autograd.grad(loss(dual), dual)
        products["dual"] = forward_ad.unpack_dual(gradient).tangent
    for name, product in products.items():
        error = (product - expected).norm() / expected.norm()
        assert error < 1e-5, name


def test_forward_mode(model, loss, loss_of_weights, x):
    v = torch.randn_like(x)
    expected = (gradient_of(loss, x) * v).sum()
    torch.testing.assert_close(jvp(loss, (x,), (v,))[1], expected)
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, expected)
    weights = weights_of(model)
    tangents = {name: torch.randn_like(weight) for name, weight in weights.items()}
    gradients = gradients_of_weights(model, x)
    expected = sum((gradients[name] * tangent).sum() for name, tangent in tangents.items())
    actual = jvp(lambda weights: loss_of_weights(weights, x), (weights,), (tangents,))[1]
    torch.testing.assert_close(actual, expected)


def test_gradients_of_functions(model, loss_of_weights, x):
    """Also with checkpointing, whose hooks ``torch.func`` does not allow."""
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        try:
            actual = grad(loss_of_weights)(weights_of(model), x)
        finally:
            model.set_grad_checkpointing(False)
        assert_close(actual, gradients_of_weights(model, x))


def test_gradients_of_each_sample(model, loss_of_weights, x):
    per_sample = vmap(grad(lambda weights, x: loss_of_weights(weights, x[None])), (None, 0))
    gradients = per_sample(weights_of(model), x)
    for index in range(len(x)):
        expected = gradients_of_weights(model, x[index : index + 1])
        assert_close({name: g[index] for name, g in gradients.items()}, expected)


def test_batched_outputs(model, x):
    actual = vmap(lambda image: model(image[None])[0])(x)
    torch.testing.assert_close(actual, model(x))
