"""Matrix products in 8 bits: close outputs, an unchanged original, and clear errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from spatial_mamba_d2.models import (
    build_backbone,
    build_classifier,
    build_upernet,
    optimize_for_inference,
    quantize_for_inference,
)
from spatial_mamba_d2.models import quantized as quantized_module
from spatial_mamba_d2.models.packed import PackedConv, PackedLinear, WinogradConv, packed_conv
from spatial_mamba_d2.models.quantized import QuantizedConv, QuantizedLinear, why_not_int8
from spatial_mamba_d2.ops import _extension

SMALL = {"embed_dim": 32, "depths": (1, 1, 1, 1)}
BUILDERS = {
    "backbone": lambda: build_backbone("tiny", **SMALL),
    "classifier": lambda: build_classifier("tiny", num_classes=7, **SMALL),
    "upernet": lambda: build_upernet("tiny", 5, channels=24, aux_channels=8, **SMALL),
}
needs_vnni = pytest.mark.skipif(bool(why_not_int8()), reason=why_not_int8() or "can multiply int8")


@pytest.fixture(params=BUILDERS)
def model(request):
    torch.manual_seed(0)
    return BUILDERS[request.param]().eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, 64, 64, generator=generator) for _ in range(2)]


def run(model, x):
    with torch.no_grad():
        outputs = model(x)
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def error(actual, expected):
    """Of the values' root mean square, the largest of all outputs."""
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


def on(images):
    return lambda model: [model(x) for x in images]


@needs_vnni
def test_close_outputs(model, images):
    x = torch.randn(2, 3, 70, 61, generator=torch.Generator().manual_seed(1))
    expected, state = run(model, x), copy.deepcopy(model.state_dict())
    quantized = quantize_for_inference(model, on(images))
    outputs = run(quantized, x)
    assert 1e-5 < error(outputs, expected) < 0.06
    assert all(output.dtype == torch.float32 for output in outputs)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert all(map(torch.equal, run(other, x), outputs))
    from_optimized = quantize_for_inference(optimize_for_inference(model), on(images))
    assert all(map(torch.equal, run(from_optimized, x), outputs))


@needs_vnni
def test_what_stays_exact(images):
    torch.manual_seed(0)
    quantized = quantize_for_inference(BUILDERS["upernet"](), on(images))
    layers = dict(quantized.named_modules())
    left = [n for n, m in layers.items() if isinstance(m, PackedLinear | PackedConv | WinogradConv)]
    depthwise = [f"backbone.stages.{i}.downsample.reduce" for i in range(3)]
    projections = [f"backbone.stages.{i}.blocks.0.ssm.x_proj" for i in range(4)]
    unused = [name for name in layers if name.startswith("auxiliary_head.") and name in left]
    assert {*left} == {
        "backbone.stem.conv1", *depthwise, *projections, "decode_head.classify", *unused
    }  # fmt: skip
    assert sum(isinstance(m, QuantizedLinear) for m in layers.values()) == 4 * 5 + 3 * 2 + 1
    assert sum(isinstance(m, QuantizedConv) for m in layers.values()) >= 10


@needs_vnni
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize(
    ("dim", "stride", "dilation"), [(16, 1, 1), (16, 2, 1), (20, 1, 2), (64, 1, 1)]
)
def test_a_convolution(act, dim, stride, dilation):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(dim, 72, 3, stride, dilation, dilation)
    layer = packed_conv(conv, act=act)
    assert isinstance(layer, WinogradConv) == (dim == 64 and not _extension.WHY_NOT_COMPILED)
    x = torch.rand(2, dim, 13, 18, generator=generator) * 3 - 1
    quantized = QuantizedConv(layer, (3 / 255, 85))
    with torch.no_grad():
        outputs = [quantized(x), quantized(x.contiguous(memory_format=torch.channels_last))]
        expected = layer(x)
        assert torch.equal(*outputs) and error(outputs[:1], [expected]) < 0.02
        assert outputs[0].shape == expected.shape
        total = quantized.add_to(expected, x)
    torch.testing.assert_close(total, expected + outputs[0])


@needs_vnni
@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_a_layer(act):
    """As exact as its grids: weights have 127 steps to the largest of each output."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator) * torch.logspace(-2, 1, 24)[:, None]
    weight[3] = 0
    layer = PackedLinear(weight, torch.randn(24, generator=generator), act=act)
    x = torch.rand(5, 7, 40, generator=generator) * 3 - 1
    quantized = QuantizedLinear(layer, (3 / 255, 85))
    expected = layer(x)
    step = (3 / 255 * weight.abs().sum(1) + x.abs().amax() * 40 * weight.abs().amax(1) / 127) / 2
    assert ((quantized(x) - expected).abs() <= 1.2 * step + 1e-6).all()
    assert quantized(x[:0]).shape == (0, 7, 24)
    to = QuantizedLinear(layer, (3 / 255, 85), to=(0.25, 30))(x)
    assert to.dtype == torch.uint8
    back = (to.float() - 30) * 0.25
    limited = quantized(x).clamp(-30 * 0.25, 225 * 0.25)
    assert ((back - limited).abs() <= 0.5001 * 0.25).all()
    if act == "none":
        sums = torch.randn(35, 24, generator=generator)
        total = sums + quantized(x).flatten(0, 1)
        quantized.add_to(sums, x.flatten(0, 1))
        torch.testing.assert_close(sums, total)


@needs_vnni
def test_channels_of_very_different_sizes(images, monkeypatch):
    """A norm whose channels differ a thousandfold; their factors move into the weights."""
    torch.manual_seed(0)
    model = BUILDERS["backbone"]().eval()
    sizes = torch.logspace(-1.5, 1.5, 32)[torch.randperm(32)]
    with torch.no_grad():
        block = model.stages[0].blocks[0]
        block.ln1.weight.mul_(sizes)
        block.ssm.in_proj.weight.div_(sizes)
    errors = []
    for migration in (quantized_module.MIGRATION, 0.0):
        monkeypatch.setattr(quantized_module, "MIGRATION", migration)
        outputs = run(quantize_for_inference(model, on(images)), images[0])
        errors.append(error(outputs, run(model, images[0])))
    assert errors[0] < 0.03 and errors[0] < errors[1]


@needs_vnni
def test_outliers_of_the_calibration_do_not_take_the_range():
    """One value in 100,000 is several times as large as the others."""
    values = quantized_module._Range()
    tokens = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = 10
    values.add(tokens)
    errors = quantized_module._Errors(values)
    errors.add(tokens)
    assert values.most == 10 and 4 < errors.best()[1] < 10


def test_what_is_refused(images, monkeypatch):
    model = BUILDERS["backbone"]()
    if why_not_int8():
        with pytest.raises(RuntimeError, match="quantize_for_inference: .*; use optimize_for_inf"):
            quantize_for_inference(model, on(images))
        monkeypatch.setattr(quantized_module, "why_not_int8", lambda: "")
    with pytest.raises(ValueError, match="calibrate must run the model that it gets, but no layer"):
        quantize_for_inference(model, lambda model: None)
    with pytest.raises(ValueError, match=r"float32, got torch\.float64"):
        quantize_for_inference(copy.deepcopy(model).double(), on(images))
    low = optimize_for_inference(model, torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32, got torch\.bfloat16"):
        quantize_for_inference(low, on(images))
    with pytest.raises(ValueError, match="model must be or contain"):
        quantize_for_inference(nn.Linear(2, 2), on(images))


def test_processors_without_the_instructions_are_named(images, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    with pytest.raises(RuntimeError, match="has no VNNI instructions; use optimize_for_inference"):
        quantize_for_inference(BUILDERS["backbone"](), on(images))


@needs_vnni
def test_a_broken_image_is_not_hidden(images):
    quantized = quantize_for_inference(BUILDERS["backbone"](), on(images))
    x = images[0].clone()
    x[0, 0, 5, 5] = float("nan")
    with pytest.raises(RuntimeError, match="quantize_uint8: x must be finite"), torch.no_grad():
        quantized(x)
