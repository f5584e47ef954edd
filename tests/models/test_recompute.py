"""Recomputation: the same gradients from less memory, and modules that are called once."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad
from torch.nn import functional as F

from spatial_mamba_d2.models import build_backbone
from spatial_mamba_d2.models.layers import LayerNorm, ReLU
from spatial_mamba_d2.models.mlp import Mlp
from spatial_mamba_d2.models.pointwise import Pointwise
from spatial_mamba_d2.models.recompute import keeps_recipes, recomputation, recompute
from spatial_mamba_d2.models.spatial_mamba import Block, Downsample
from tests.models.gradients import (
    SMALL,
    assert_close,
    assert_equal,
    gradients_of,
    loss_of,
    narrow_backbone,
)


@pytest.fixture
def backbone():
    return narrow_backbone()


def kept_bytes(model, function):
    """Distinct storages that autograd keeps of ``function()``, except parameters."""
    own = {id(p.untyped_storage()) for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            storages[id(storage)] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 45, 71), (1, 3, 33, 1)], ids=str)
def test_gradients_are_those_of_plain_computation(shape, dtype, backbone):
    backbone.to(dtype)
    for norm in backbone.stem.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()  # 33 x 1 pixels leave it too few values
    x = torch.randn(shape, dtype=dtype)
    with recomputation(False):
        expected = gradients_of(backbone.eval() if min(shape) == 1 else backbone, x)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-13
    assert_close(gradients_of(backbone, x), expected, tolerance)


def test_gradients_under_autocast(backbone):
    """As near to those in float32 as without recipes; the order of roundings differs."""
    x = torch.randn(2, 3, 45, 71)

    def gradients(autocast, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), recomputation(enabled):
            loss = loss_of(backbone, x)
        backbone.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in backbone.parameters()])

    exact = gradients(autocast=False, enabled=False)
    error, plain_error = (
        (gradients(autocast=True, enabled=enabled) - exact).norm() for enabled in (True, False)
    )
    assert 0 < error < 1.5 * plain_error < 0.3 * exact.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_keeps_ten_channels_for_each_of_its_width(autocast):
    """Its input, u and z, its middle, the hidden layer; and little more."""
    dim, tokens = 64, 40 * 40
    block = Block(dim, ssm_ratio=2.0, mlp_ratio=4.0, drop_path=0.5).train()
    x = torch.randn(1, 40, 40, dim, requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            block(x)

    size = 2 * 4 + (4 + 4) * (2 if autocast else 4)  # of x and the middle; of products
    kept = kept_bytes(block, run) / (tokens * dim)
    assert size <= kept < 1.05 * size
    with recomputation(False):
        assert kept_bytes(block, run) / (tokens * dim) > 1.8 * size


@pytest.mark.parametrize("autocast", [False, True])
def test_a_downsampling_keeps_its_input_and_what_batch_norm_sees(autocast):
    dim = 16
    layer = Downsample(dim).train()
    x = torch.randn(2, 48, 48, dim, requires_grad=True)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layer(x)

    kept = kept_bytes(layer, run)
    normalized = x.nbytes // 2 // (2 if autocast else 1)  # a quarter of the tokens, twice as wide
    assert x.nbytes + normalized <= kept < 1.05 * (x.nbytes + normalized)
    with recomputation(False):
        assert kept_bytes(layer, run) > 5 * x.nbytes


def test_training_keeps_less_than_swin():
    """0.7 of it, without gradient checkpointing."""
    x = torch.randn(2, 3, 256, 256)
    ours = build_backbone("tiny").train()
    swin = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=256)
    kept = [kept_bytes(model, lambda m=model: m(x)) for model in (ours, swin.train())]
    assert kept[0] <= 0.7 * kept[1]


def test_what_is_kept_passes_through_the_hooks_around(backbone):
    x = torch.randn(2, 3, 64, 64)
    expected = gradients_of(backbone, x)
    backbone.zero_grad()
    num_packed = num_unpacked = 0

    def pack(tensor):
        nonlocal num_packed
        num_packed += 1
        # Of the same strides, because matrix products round in another order for others.
        return tensor.new_empty_strided(tensor.size(), tensor.stride()).copy_(tensor)

    def unpack(packed):
        nonlocal num_unpacked
        num_unpacked += 1
        return packed

    with saved_tensors_hooks(pack, unpack):
        loss = loss_of(backbone, x)
    loss.backward()
    assert num_packed >= num_unpacked > 0
    assert_equal({name: p.grad for name, p in backbone.named_parameters()}, expected)


@pytest.mark.parametrize("kind", [nn.Parameter, type("Special", (nn.Parameter,), {})])
def test_parameters_do_not_pass_through_them(backbone, kind):
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, kind(parameter.detach()))
    memory = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    packed = set()
    pack = lambda x: packed.add(x.untyped_storage().data_ptr()) or x  # noqa: E731
    with saved_tensors_hooks(pack, lambda x: x):
        backbone.stages[0](torch.randn(1, 8, 8, 16, requires_grad=True))
    assert packed and not packed & memory


def test_weights_may_be_replaced_before_backward(backbone):
    """By ``data``, which raises no version: the gradients are of the forward pass's weights."""
    stage, x = backbone.stages[0], torch.randn(1, 8, 8, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(stage(x).square().sum(), x)
    loss = stage(x).square().sum()
    for parameter in stage.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert torch.equal(*torch.autograd.grad(loss, x), expected)


def test_save_on_cpu(backbone):
    """Its copies are dense, whatever the strides of the saved tensors were."""
    x = torch.randn(2, 3, 45, 71)
    expected = gradients_of(backbone, x)
    with save_on_cpu():
        gradients = gradients_of(backbone, x)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing(backbone):
    x = torch.randn(2, 3, 64, 64)
    expected, kept = gradients_of(backbone, x), kept_bytes(backbone, lambda: backbone(x))
    backbone.grad_checkpointing = True
    assert_equal(gradients_of(backbone, x), expected)
    assert kept_bytes(backbone, lambda: backbone(x)) < 0.6 * kept
    loss = loss_of(backbone, x)
    for _ in range(2):
        gradients = torch.autograd.grad(loss, list(backbone.parameters()), retain_graph=True)
        assert_equal(dict(zip(expected, gradients, strict=True)), expected)


def test_gradient_checkpointing_stops_early():
    """A block's second forward pass ends with the last tensor that backward cannot recompute."""
    backbone = build_backbone("tiny", **{**SMALL, "drop_path_rate": 0.0}, grad_checkpointing=True)
    calls = Counter()
    mlp = backbone.stages[1].blocks[0].mlp
    for name, layer in mlp.named_children():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    loss_of(backbone, torch.randn(2, 3, 64, 64)).backward()
    assert calls == {"fc1": 2, "act": 1, "fc2": 1}


def test_a_retained_graph_gives_the_same_gradients_again(backbone):
    x = torch.randn(2, 3, 64, 64)
    expected = gradients_of(backbone, x)
    loss = loss_of(backbone, x)
    weights = dict(backbone.named_parameters())
    some = dict(list(weights.items())[-40::3])
    for wanted in (weights, some, weights):
        gradients = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True)
        assert_equal(
            dict(zip(wanted, gradients, strict=True)), {name: expected[name] for name in wanted}
        )


def test_a_retained_graph_holds_no_activations():
    """What backward computed again is given back after its last use, and computed once."""
    computed = []

    def gelu(x):
        output = F.gelu(x)
        computed.append(weakref.ref(output.untyped_storage()))
        return output

    weights = [nn.Parameter(torch.randn(8, 8)) for _ in range(3)]

    @keeps_recipes
    def forward(x):
        x = recompute(gelu, x)
        return sum(F.linear(x, weight) for weight in weights)

    loss = forward(torch.randn(4, 8, requires_grad=True)).sum()
    assert len(computed) == 1 and computed[0]() is None
    for num_calls in (2, 3):
        loss.backward(retain_graph=True)
        assert len(computed) == num_calls and computed[-1]() is None


def test_weights_modified_before_backward_are_noticed(backbone):
    loss = loss_of(backbone, torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        backbone.stages[1].blocks[0].ln1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_output_that_is_modified_is_kept():
    @keeps_recipes
    def forward(x, weight, scale):
        return F.linear(recompute(F.gelu, x).mul_(scale), weight)

    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    gradients = []
    for enabled in (True, False):
        with recomputation(enabled):
            gradients.append(torch.autograd.grad(forward(x, weight, 3.0).sum(), [x, weight]))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_views_of_an_output():
    def forward(x, weights):
        y = recompute(F.gelu, x)
        parts = (y[:, 2:6], y.t()[1:5].t(), y.view(2, -1, 8)[1, :, 4:])
        return sum(F.linear(part, w).square().sum() for part, w in zip(parts, weights, strict=True))

    x = torch.randn(10, 8, requires_grad=True)
    weights = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(forward(x, weights), [x, *weights])
    gradients = torch.autograd.grad(keeps_recipes(forward)(x, weights), [x, *weights])
    for actual, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=0)


def test_a_function_may_save_its_own_output():
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    layer, act = Pointwise(5, 5), ReLU()

    @keeps_recipes
    def forward(x):
        return layer(act(recompute(torch.sigmoid, x) - 0.5))

    assert kept_bytes(layer, lambda: forward(x)) == 2 * x.nbytes  # what sigmoid and ReLU see
    gradients = []
    for enabled in (True, False):
        with recomputation(enabled):
            gradients.append(torch.autograd.grad(forward(x).sum(), [x, layer.weight]))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_second_derivatives():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    norm, mlp = LayerNorm(8).double(), Mlp(8, 16).double()

    def penalty(x):
        output = keeps_recipes(lambda x: mlp(norm(x)))(x).square().sum()
        (gradient,) = torch.autograd.grad(output, x, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, x)
    second = torch.autograd.grad(penalty(x), [x, mlp.fc1.weight])
    with recomputation(False):
        expected = torch.autograd.grad(penalty(x), [x, mlp.fc1.weight])
    for actual, value in zip(second, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=0, atol=0)


def test_functional_gradients_are_computed_plainly():
    """``torch.func`` allows no saved-tensor hooks."""
    mlp = Mlp(8, 16)
    forward = keeps_recipes(lambda weights, x: functional_call(mlp, weights, (x,)).square().sum())
    weights, x = dict(mlp.named_parameters()), torch.randn(1, 4, 4, 8)
    expected = torch.autograd.grad(forward(weights, x), list(weights.values()))
    given = {name: p.detach() for name, p in weights.items()}
    assert_equal(grad(forward)(given, x), dict(zip(weights, expected, strict=True)))


def test_a_graph_that_is_dropped_leaves_nothing(backbone):
    x = torch.randn(1, 3, 64, 64)
    seen = []
    handle = (
        backbone.stages[0]
        .blocks[0]
        .ssm.in_proj.register_forward_hook(
            lambda module, inputs, output: seen.append(weakref.ref(output.untyped_storage()))
        )
    )
    gc.disable()  # reference counts alone free it
    try:
        loss = loss_of(backbone, x)
        assert seen[0]() is not None
        del loss
        assert seen[0]() is None
    finally:
        gc.enable()
        handle.remove()


def test_a_failed_forward_pass_leaves_no_trace(backbone):
    x = torch.randn(1, 3, 64, 64)
    expected = gradients_of(backbone, x)

    def fail(*_):
        raise ZeroDivisionError

    handle = backbone.stages[2].blocks[1].ssm.out_norm.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        backbone(x)
    handle.remove()
    calls = []
    recompute(
        lambda y: calls.append(y) or y * 2, torch.ones(3, requires_grad=True)
    ).sum().backward()
    assert len(calls) == 1
    assert_equal(gradients_of(backbone, x), expected)


def test_threads_do_not_see_each_other():
    outcomes = []

    def run():
        y = torch.randn(3, requires_grad=True)
        calls = []
        recompute(lambda y: calls.append(y) or y.exp(), y).sum().backward()
        outcomes.append(len(calls))

    @keeps_recipes
    def forward(x):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return recompute(torch.exp, x)

    forward(torch.randn(3, requires_grad=True)).sum().backward()
    assert outcomes == [1]


def test_the_switch_is_scoped():
    x = torch.randn(3, requires_grad=True)
    calls = []

    @keeps_recipes
    def forward():
        return recompute(lambda x: calls.append(x) or x.exp(), x).square().sum()

    with recomputation(False):
        forward().backward()
        assert len(calls) == 1
        with recomputation(True):
            forward().backward()
        assert len(calls) == 3
        forward().backward()
        assert len(calls) == 4
    forward().backward()
    assert len(calls) == 6
    with torch.no_grad():
        forward()
    assert len(calls) == 7


def test_models_are_copied_and_pickled(backbone):
    x = torch.randn(1, 3, 64, 64)
    loss = loss_of(backbone, x)  # also while a graph exists
    for copied in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert_equal(gradients_of(copied, x), gradients_of(backbone, x))
    loss.backward()


def test_the_private_interface_of_pytorch():
    """What :mod:`.recompute` takes from it; its list is in CONTRIBUTING."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks
    assert hooks(False) is None

    def pack(tensor):
        return tensor

    def unpack(tensor):
        return tensor

    with saved_tensors_hooks(pack, unpack):
        assert tuple(hooks(False)) == (pack, unpack)
    assert torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() == "not here"
    assert not torch._C._are_functorch_transforms_active()
    grad(lambda x: (x * torch._C._are_functorch_transforms_active()).sum())(torch.ones(1))
    passes = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: passes.append(torch._C._current_graph_task_id()))
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert torch._C._current_graph_task_id() == -1 not in passes and passes[0] != passes[1]
