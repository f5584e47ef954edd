"""Training on a GPU stores no step sizes, unless the layer that computes them is another one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_mamba_d2.models.pointwise import Pointwise
from spatial_mamba_d2.models.recompute import recomputation
from spatial_mamba_d2.models.spatial_mamba import Block
from spatial_mamba_d2.profiling.gpu import launch_times
from spatial_mamba_d2.profiling.memory import saved_bytes
from tests.ops.conftest import relative_error


class Doubled(Pointwise):
    """A replaced layer."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def x(device) -> torch.Tensor:
    return torch.randn(2, 9, 13, 32, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.fixture
def block(device) -> Block:
    """Not as it is initialised: its step sizes matter."""
    torch.manual_seed(0)
    block = Block(32, 2.0, 4.0, 0.0)
    for p in block.ssm.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return block.to(device).train()


def with_hook(block: Block) -> Block:
    """A copy, in which every layer is called."""
    block = copy.deepcopy(block)
    block.ssm.dt_proj.register_forward_hook(lambda *_: None)
    return block


def train(block, x):
    """The output, and the gradients of the weights."""
    block.zero_grad()
    y = block(x)
    y.float().square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in block.named_parameters()}


def kernels_of(block, x, device) -> set[str]:
    with launch_times(device) as times:
        train(block, x)
    return {name for name in times if "Steps<" in name}


def test_kernels_compute_them(block, x, device):
    computed, stored = (kernels_of(b, x, device) for b in (block, with_hook(block)))
    assert computed and all("LowRankSteps<" in name for name in computed)
    assert stored and all("StoredSteps<" in name for name in stored)
    assert len(computed) == len(stored) == 5


def test_results_are_those_of_the_layer(block, x):
    y, gradients = train(block, x)
    expected, of_layer = train(with_hook(block), x)
    assert relative_error(y, expected) < 1e-5
    for name, gradient in of_layer.items():
        assert relative_error(gradients[name], gradient) < 1e-4, name


def test_a_replaced_layer_is_called(block, x):
    plain, _ = train(block, x)
    block.ssm.dt_proj.__class__ = Doubled
    y, gradients = train(block, x)
    expected, of_layer = train(with_hook(block), x)
    assert relative_error(y, expected) < 1e-5 < 1e-3 < relative_error(y, plain)
    for name, gradient in of_layer.items():
        assert relative_error(gradients[name], gradient) < 1e-4, name


def test_a_bias_is_added(block, x):
    """By a layer that is exactly ours otherwise; the operator has none."""
    before, _ = train(block, x)
    block.ssm.dt_proj.bias = nn.Parameter(torch.ones_like(block.ssm.dt_bias))
    after, gradients = train(block, x)
    assert relative_error(after, before) > 1e-3
    assert gradients["ssm.dt_proj.bias"].any()


def test_nothing_more_is_kept(block, x):
    kept = [saved_bytes(b, lambda b=b: train(b, x)) for b in (block, with_hook(block))]
    assert 0 < kept[0] <= kept[1]


class _Recorder(TorchDispatchMode):
    """Dtypes of the operator's first inputs."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.spatial_mamba.structure_aware_ssm_from_dt.default:
            self.dtypes.update(x.dtype for x in args[:3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_converts_both_factors(block, x, device, dtype):
    """As before a linear layer, whether or not what is computed for it is recorded."""
    with torch.autocast(device, dtype):
        (y, gradients), (expected, of_layer) = (train(b, x) for b in (block, with_hook(block)))
        for grad_enabled, recorded in ((True, True), (True, False), (False, True)):
            recorder = _Recorder()
            with torch.set_grad_enabled(grad_enabled), recomputation(recorded), recorder:
                block(x)
            assert recorder.dtypes == {dtype}
    assert relative_error(y, expected) < 0.02
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, of_layer[name]) < 0.05, name


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_code_computes_them(block, x, device, kernels, autocast):
    torch.compiler.reset()
    backend = "inductor" if kernels == "CUDA" else "aot_eager"
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        expected, gradients = train(block, x)
        with launch_times(device) as times:
            actual, others = train(compiled, x)
    assert times and not any("StoredSteps<" in name for name in times)
    limit = 0.05 if autocast else 1e-4
    assert relative_error(actual, expected) < limit
    for name, gradient in gradients.items():
        assert relative_error(others[f"_orig_mod.{name}"], gradient) < limit, name
