"""The backbone under torch.compile and torch.export (one graph, any size) and autocast."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from spatial_mamba_d2.models import build_backbone
from spatial_mamba_d2.models.recompute import _checkpoint_policy
from spatial_mamba_d2.models.spatial_mamba import Block, Downsample
from spatial_mamba_d2.ops.cuda.kernels import OPENERS

SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    yield build_backbone("tiny", **SMALL).eval()
    torch.compiler.reset()


def close(actual, expected):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_graph_for_inference(backbone):
    """Dynamo finds the graphs; ``aot_eager`` and inductor, which take them, are tried below.

    Images of at most 6826 pixels would need a second graph, in which PyTorch convolves otherwise.
    """
    torch._dynamo.utils.counters.clear()  # of other tests
    compiled = torch.compile(backbone, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for size in ((75, 101), (70, 99), (128, 57)):
            x = torch.randn(1, 3, *size)
            close(compiled(x), backbone(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.long
def test_one_graph_for_training(backbone):
    """Backward included; the test below tries its parts."""
    backbone.train()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 96)
    gradients = []
    for model in (backbone, compiled):
        backbone.zero_grad()
        sum(output.pow(3).mean() for output in model(x).values()).backward()
        gradients.append([p.grad.clone() for p in backbone.parameters()])
    for plain, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [Block(32, 2.0, 4.0, 0.3), Downsample(32)], ids=["block", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_compiled_training_keeps_what_eager_training_keeps(layer, dtype):
    """Products are convolutions in float32 on CPUs, otherwise ``mm`` and ``addmm``."""
    x = torch.randn(2, 24, 24, 32, dtype=dtype, requires_grad=True)
    layer.to(dtype)
    kept, gradients = [], []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        storages = {}

        def pack(tensor, storages=storages):
            storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor

        torch.manual_seed(0)  # of stochastic depth
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = function(x)
        output.pow(3).mean().backward()
        own = {id(p.untyped_storage()) for p in layer.parameters()}
        kept.append(sum(s.nbytes() for key, s in storages.items() if key not in own))
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert kept[1] < 1.05 * kept[0]
    torch.compiler.reset()


@pytest.mark.slow
def test_export_with_any_height_and_width(backbone, tmp_path):
    height, width = (torch.export.Dim(name, min=33, max=4096) for name in ("height", "width"))
    shapes = {"x": {2: height, 3: width}}
    program = torch.export.export(backbone, (torch.randn(1, 3, 64, 96),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "backbone.pt2")
    loaded = torch.export.load(tmp_path / "backbone.pt2").module()
    with torch.no_grad():
        for size in ((33, 33), (75, 101), (224, 50)):
            x = torch.randn(1, 3, *size)
            close(loaded(x), backbone(x))


def test_bfloat16_autocast(backbone):
    x = torch.randn(1, 3, 61, 95)
    with torch.no_grad():
        expected = backbone(x)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = backbone(x)
    for name, value in expected.items():
        assert (outputs[name].float() - value).abs().max() <= 0.1 * value.abs().max(), name


def test_training_step_under_bfloat16_autocast(backbone):
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enabled in (False, True):
        backbone.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = backbone(x).values()
            loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    assert gradients[1].dtype == torch.float32 and gradients[1].isfinite().all()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("name", ["structure_aware_ssm", "structure_aware_ssm_from_dt"])
def test_the_output_of_the_ssm_is_kept_on_gpus(name, monkeypatch):
    """It is the slowest part of a block there; on CPUs it is computed again."""
    operator = getattr(torch.ops.spatial_mamba, name).default
    u = torch.zeros(1)
    keep, compute = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    assert _checkpoint_policy(None, operator, u) == compute
    monkeypatch.setitem(OPENERS, "cpu", None)
    assert _checkpoint_policy(None, operator, u) == keep
