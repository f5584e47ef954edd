"""The optimised copy: the same outputs, an unchanged original, and clear errors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from spatial_mamba_d2.models import (
    build_backbone,
    build_classifier,
    build_upernet,
    inference_only,
    optimize_for_inference,
)
from spatial_mamba_d2.models import optimized as optimized_module
from spatial_mamba_d2.models import packed as packed_module
from spatial_mamba_d2.ops import _extension, winograd_conv3x3

SMALL = {"embed_dim": 16, "depths": (1, 1, 2, 1)}
BUILDERS = {
    "backbone": lambda: build_backbone("tiny", **SMALL),
    "classifier": lambda: build_classifier("tiny", num_classes=7, **SMALL),
    "upernet": lambda: build_upernet("tiny", 5, channels=24, aux_channels=8, **SMALL),
}


def randomise(model: nn.Module) -> nn.Module:
    """Weights and statistics of which none has a value that makes a mistake invisible."""
    generator = torch.Generator().manual_seed(0)

    def uniform(x, low, high):
        x.copy_(torch.empty(x.shape).uniform_(low, high, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 2.0)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
        for name, parameter in model.named_parameters():
            if name.rsplit(".")[-1] in ("alpha", "A_log", "D") or "fusion.kernel" in name:
                uniform(parameter, -0.5, 0.5)
            elif name.endswith((".fc1.bias", ".fc2.bias", ".conv.bias", ".classify.bias")):
                uniform(parameter, -0.5, 0.5)
    return model.eval()


@pytest.fixture(params=BUILDERS)
def model(request):
    torch.manual_seed(0)
    return randomise(BUILDERS[request.param]())


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return randomise(BUILDERS["backbone"]())


def run(model, x):
    with torch.no_grad():
        outputs = model(x)
    return list(outputs.values()) if isinstance(outputs, dict) else [outputs]


def error(actual, expected):
    return max(
        ((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("tile_bytes", [1, 40_000, optimized_module.TILE_BYTES], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 1), (1, 3, 1, 37), (2, 3, 33, 64), (2, 3, 61, 95)], ids=str
)
def test_equal_outputs(shape, tile_bytes, model, monkeypatch):
    x = torch.randn(shape)
    expected = run(model, x)
    monkeypatch.setattr(optimized_module, "TILE_BYTES", tile_bytes)
    outputs = run(optimize_for_inference(model), x)
    assert error(outputs, expected) < 1e-4
    for output, other in zip(outputs, expected, strict=True):
        assert output.dtype == other.dtype and output.is_contiguous(
            memory_format=torch.channels_last if output.dim() == 4 else torch.contiguous_format
        )


def test_equal_outputs_of_the_real_size():
    torch.manual_seed(0)
    model = randomise(build_backbone("tiny"))
    x = torch.randn(1, 3, 100, 140)
    assert error(run(optimize_for_inference(model), x), run(model, x)) < 1e-4


@pytest.mark.parametrize("bn_policy", ["frozen", "sync"])
def test_all_batch_norms_are_folded(bn_policy):
    model = randomise(build_upernet("tiny", channels=8, bn_policy=bn_policy, **SMALL))
    optimized = optimize_for_inference(model)
    norms = [m for m in optimized.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms == []
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():  # sync batch norms run in eval mode only on CPUs
        assert error([optimized(x)], [model(x)]) < 1e-4


def test_the_original_stays_as_it_is(model):
    x = torch.randn(1, 3, 40, 56)
    before, state = run(model, x), copy.deepcopy(model.state_dict())
    model.train()
    optimized = optimize_for_inference(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    model.eval()
    for output, other in zip(run(model, x), before, strict=True):
        assert torch.equal(output, other)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = run(optimized, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for output, other in zip(run(optimized, x), expected, strict=True):
        assert torch.equal(output, other), "weights are shared with the original"


def test_interface_of_the_original(backbone):
    optimized = optimize_for_inference(backbone)
    assert isinstance(optimized, type(backbone))
    assert optimized.output_shape() == backbone.output_shape()
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\] with H, W >= 1, got \["):
        optimized(torch.randn(1, 4, 8, 8))


def test_copies_of_an_optimised_model(model):
    optimized = optimize_for_inference(model)
    assert optimize_for_inference(optimized) is optimized
    x = torch.randn(1, 3, 40, 56)
    for output, other in zip(run(copy.deepcopy(optimized), x), run(optimized, x), strict=True):
        assert torch.equal(output, other)


def test_inside_of_another_module(backbone):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = backbone
            self.top = nn.Conv2d(128, 3, 1)

        def forward(self, x):
            return self.top(self.body(x)["res5"])

    holder = Holder().eval()
    x = torch.randn(1, 3, 40, 56)
    expected = run(holder, x)
    assert error(run(optimize_for_inference(holder), x), expected) < 1e-4
    holder.body = optimize_for_inference(backbone)
    assert error(run(holder, x), expected) < 1e-4
    assert holder.eval() is holder
    for refused in (holder.train, holder.state_dict):
        with pytest.raises(RuntimeError, match="OptimizedSpatialMambaBackbone has no"):
            refused()


def test_what_is_refused(model):
    state = model.state_dict()
    optimized = optimize_for_inference(model)
    x = torch.randn(1, 3, 40, 56)
    refused = [
        ("has no train mode", lambda: optimized.train()),
        ("has no gradients", lambda: optimized.requires_grad_()),
        ("has no gradients", lambda: optimized(x.clone().requires_grad_())),
        ("cannot load a state dict", lambda: optimized.load_state_dict(state)),
        ("cannot load a state dict", lambda: optimized.load_state_dict({}, strict=False)),
        ("has no state dict", lambda: optimized.state_dict()),
        ("cannot change its dtype or device", lambda: optimized.double()),
        ("cannot change its dtype or device", lambda: optimized.to("meta")),
    ]
    for part in (m for m in optimized.modules() if isinstance(m, optimized_module.OptimizedStage)):
        refused.append(("has no train mode", part.train))
    for message, call in refused:
        with pytest.raises(RuntimeError, match=f"{message}: its weights are folded"):
            call()
    assert not any(module.training for module in optimized.modules())
    assert optimized.eval() is optimized.to("cpu").float().requires_grad_(False)
    assert error(run(optimized, x), run(model, x)) < 1e-4


def test_capture_and_transforms_are_refused(model):
    optimized = optimize_for_inference(model)
    x = torch.randn(1, 3, 40, 56)
    graph = "cannot be traced, scripted or exported"
    derivative = "has no gradients and no transforms of torch.func"

    def forward_mode():
        with forward_ad.dual_level():
            optimized(forward_ad.make_dual(x, torch.ones_like(x)))

    refused = [
        (graph, lambda: torch.jit.trace(optimized, x)),
        (graph, lambda: torch.jit.script(optimized)),
        (graph, lambda: torch.export.export(optimized, (x,), strict=False)),
        (graph, lambda: torch.fx.symbolic_trace(optimized)),
        (derivative, forward_mode),
        (derivative, lambda: torch.func.vmap(lambda image: optimized(image[None]))(x)),
        (derivative, lambda: torch.func.jvp(optimized, (x,), (x,))),
    ]
    for message, call in refused:
        with pytest.raises(RuntimeError, match=f"{message}: its weights are folded"):
            call()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("packed", [True, False])
def test_what_is_not_finite_stays_so(value, packed, model, monkeypatch):
    if not packed:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x = torch.randn(1, 3, 70, 48)
    x[0, 1, 30, 20] = float(value)
    for dtype in (None, torch.bfloat16):
        outputs = run(optimize_for_inference(model, dtype), x)
        for output, expected in zip(outputs, run(model, x), strict=True):
            hidden = output.isfinite() & ~expected.isfinite()
            assert not hidden.any() and not output.isfinite().all()


def test_a_weight_that_is_not_a_number_is_not_hidden(backbone):
    with torch.no_grad():
        backbone.stem.conv1.conv.weight[0, 0, 0, 0] = torch.nan
    outputs = run(optimize_for_inference(backbone), torch.randn(1, 3, 40, 56))
    assert all(output.isnan().all() for output in outputs)


def test_it_travels_to_another_process(backbone, tmp_path):
    """Which has imported nothing of ours."""
    x = torch.randn(1, 3, 40, 56)
    optimized = optimize_for_inference(backbone)
    expected = run(optimized, x)
    torch.save((optimized, x), tmp_path / "model.pth")
    loaded, _ = torch.load(tmp_path / "model.pth", weights_only=False)
    assert type(loaded) is type(optimized)
    with pytest.raises(RuntimeError, match="OptimizedSpatialMambaBackbone has no train mode"):
        pickle.loads(pickle.dumps(optimized)).train()
    program = (
        "import torch\n"
        f"model, x = torch.load({str(tmp_path / 'model.pth')!r}, weights_only=False)\n"
        "with torch.no_grad(): outputs = list(model(x).values())\n"
        f"torch.save(outputs, {str(tmp_path / 'outputs.pth')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    for outputs in (run(loaded, x), torch.load(tmp_path / "outputs.pth")):
        assert error(outputs, expected) < 1e-6


def test_a_gradient_that_starts_inside_is_refused(backbone):
    optimized = optimize_for_inference(backbone)
    assert not any(p.requires_grad for p in optimized.parameters())
    optimized.stages[0].blocks[0].cpe1_ln1.norm.weight.requires_grad = True
    with pytest.raises(RuntimeError, match="OptimizedSSM has no gradients"):
        optimized(torch.randn(1, 3, 32, 32))


def packed_parts(model):
    return [m for m in model.modules() if isinstance(m, packed_module._Packed)]


def test_float64_is_folded_and_not_packed(model):
    model.double()
    x = torch.randn(2, 3, 33, 64, dtype=torch.float64)
    optimized = optimize_for_inference(model)
    assert not any(part.packed for part in packed_parts(optimized))
    assert error(run(optimized, x), run(model, x)) < 1e-11


def test_without_onednn(model, monkeypatch):
    x = torch.randn(2, 3, 33, 64)
    expected = run(model, x)
    assert all(part.packed for part in packed_parts(optimize_for_inference(model)))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    optimized = optimize_for_inference(model)
    assert not any(part.packed for part in packed_parts(optimized))
    assert error(run(optimized, x), expected) < 1e-4
    assert error(run(copy.deepcopy(optimized), x), expected) < 1e-4


def test_bfloat16_is_as_exact_as_autocast(model):
    x = torch.randn(2, 3, 61, 95)
    expected = run(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = [output.float() for output in run(model, x)]
    outputs = run(optimize_for_inference(model, torch.bfloat16), x)
    assert all(output.dtype == torch.float32 for output in outputs)
    assert 1e-4 < error(outputs, expected) < max(2 * error(autocast, expected), 0.02)


def test_float32_stays_float32_under_autocast(backbone, caplog):
    """Which is said once, and not where autocast asks for the dtype of the products."""
    inference_only._say_that_autocast_is_ignored.cache_clear()
    x = torch.randn(1, 3, 40, 56)
    optimized = optimize_for_inference(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        run(optimize_for_inference(backbone, torch.bfloat16), x)
        assert not caplog.messages
        outputs = run(optimized, x)
        run(optimized, x)
    assert error(outputs, run(backbone, x)) < 1e-4
    inference_only.mention_autocast(optimized, (x.to("meta"),), None)  # there is no autocast
    (message,) = caplog.messages
    assert "use optimize_for_inference(model, dtype=torch.bfloat16)" in message


def test_bad_arguments_are_named(backbone):
    with pytest.raises(ValueError, match="model must be or contain a Spatial-Mamba .* got Linear"):
        optimize_for_inference(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"dtype must be a floating point type, got torch\.int8"):
        optimize_for_inference(backbone, torch.int8)


def test_foreign_layers_are_not_ignored(backbone):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    ssm = backbone.stages[1].blocks[0].ssm
    ssm.in_proj = Adapted(ssm.in_proj.in_features, ssm.in_proj.out_features)
    message = r"got Adapted as blocks\.0\.ssm\.in_proj of a Stage; merge adapters"
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(backbone)


def test_parametrisations_are_computed(backbone):
    x = torch.randn(1, 3, 40, 56)
    ssm = backbone.stages[1].blocks[0].ssm
    nn.utils.parametrizations.weight_norm(ssm.in_proj)
    with torch.no_grad():
        ssm.in_proj.parametrizations.weight.original0.mul_(2)
    assert error(run(optimize_for_inference(backbone), x), run(backbone, x)) < 1e-4


@pytest.mark.skipif(_extension.WHY_NOT_COMPILED is not None, reason="no compiled kernels")
@pytest.mark.parametrize(
    ("shape", "is_direct"), [((2, 64, 4, 8), True), ((1, 64, 5, 13), False)], ids=str
)
def test_the_smallest_maps_are_convolved_directly(monkeypatch, shape, is_direct):
    """With the same result up to rounding, also after a copy."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 72, 3, padding=1).requires_grad_(False)
    optimized = packed_module.packed_conv(conv, act="relu")
    assert isinstance(optimized, packed_module.WinogradConv)
    calls = []

    def winograd(*inputs):
        calls.append(inputs[0].shape)
        return winograd_conv3x3(*inputs)

    monkeypatch.setattr(packed_module, "winograd_conv3x3", winograd)
    x = torch.randn(shape)
    with torch.no_grad():
        for layer in (optimized, copy.deepcopy(optimized)):
            torch.testing.assert_close(layer(x), conv(x).relu(), rtol=1e-4, atol=1e-5)
    has_direct = torch.backends.mkldnn.is_available()
    assert len(calls) == (0 if is_direct and has_direct else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_heads_are_computed_by_winograds_algorithm(dtype):
    torch.manual_seed(0)
    model = randomise(build_upernet("tiny", 5, channels=64, aux_channels=8, **SMALL))
    optimized = optimize_for_inference(model, dtype)
    fuse = optimized.decode_head.fuse
    is_native = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not is_native and not _extension.WHY_NOT_COMPILED:
        assert isinstance(fuse, packed_module.WinogradConv)
    x = torch.randn(2, 3, 75, 50)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert error(run(optimized, x), run(model, x)) <= tolerance
