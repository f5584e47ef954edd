"""Linear layers in 8 bits, by PyTorch's dynamic quantisation and by torchao."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from spatial_mamba_d2.models import build_classifier, with_plain_linear_layers


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_classifier("tiny", num_classes=5, embed_dim=32, depths=(1, 1, 1, 1)).eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def linear_layers(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_plain_linear_layers_compute_the_same(model, x):
    plain = with_plain_linear_layers(model)
    assert {type(layer) for layer in linear_layers(plain)} == {nn.Linear}
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert not any(module.training for module in plain.modules())
    assert 0 < sum(type(layer) is not nn.Linear for layer in linear_layers(model))
    torch.testing.assert_close(plain(x), model(x))


@torch.no_grad()
def test_dynamic_quantisation(model, x):
    quantization = pytest.importorskip("torch.ao.quantization", reason="torch.ao is gone")
    from torch.ao.nn.quantized.dynamic import Linear

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        quantised = quantization.quantize_dynamic(with_plain_linear_layers(model), {nn.Linear})
    assert not linear_layers(quantised)
    layers = [module for module in quantised.modules() if isinstance(module, Linear)]
    assert len(layers) == len(linear_layers(model))
    assert 1e-4 < relative_error(quantised(x), model(x)) < 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_torchao(config, model, x):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantised = copy.deepcopy(model)
    torchao.quantize_(quantised, getattr(torchao, config)())
    kinds = {type(layer.weight.data) for layer in linear_layers(quantised)}
    assert torch.Tensor not in kinds
    assert 1e-4 < relative_error(quantised(x), model(x)) < 0.1
