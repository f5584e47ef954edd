"""Graphs of the model by torch.fx, as extractors of intermediate features use them, TorchScript."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from timm.layers import create_feature_extractor as timm_feature_extractor
from torchvision.models.feature_extraction import create_feature_extractor

from spatial_mamba_d2.models import build_backbone, build_classifier, build_upernet

SMALL = {"embed_dim": 16, "depths": (1, 1, 1, 1), "drop_path_rate": 0.5}
BUILDERS = {
    "backbone": lambda: build_backbone("tiny", **SMALL),
    "classifier": lambda: build_classifier("tiny", num_classes=3, **SMALL),
    "segmentor": lambda: build_upernet("tiny", 3, channels=8, aux_channels=8, **SMALL),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_graph_of_torch_fx_computes_the_same(build):
    model = build().eval()
    graph = torch.fx.symbolic_trace(model)
    for size in ((64, 64), (33, 70)):
        x = torch.randn(1, 3, *size)
        expected, actual = model(x), graph(x)
        if isinstance(expected, torch.Tensor):
            expected, actual = {"": expected}, {"": actual}
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\]"):
        graph(torch.randn(1, 4, 32, 32))


@pytest.mark.parametrize("create", [create_feature_extractor, timm_feature_extractor])
def test_extractors_of_features(create):
    model = build_classifier("tiny", num_classes=3, **SMALL)
    nodes = {
        "stages.1.blocks": "middle",
        "stages.3.blocks.0.ssm.out_norm": "norm",
        "head": "logits",
    }
    extractor = create(model, nodes)
    x = torch.randn(2, 3, 64, 64)
    outputs = extractor.train()(x)  # with stochastic depth
    outputs["logits"].sum().backward()
    assert all(p.grad is not None for p in extractor.parameters())
    seen = []
    model.stages[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    outputs, expected = extractor.eval()(x), model.eval()(x)
    assert torch.equal(outputs["logits"], expected) and torch.equal(outputs["middle"], seen[0])
    assert outputs["norm"].shape == (2, 2, 2, 256)


@pytest.mark.parametrize("name", ["backbone", "classifier"])
def test_torchscript_computes_the_same(name, tmp_path):
    model = BUILDERS[name]()
    with pytest.raises(RuntimeError, match=r"torch.jit.script needs the model in eval\(\)"):
        torch.jit.script(model)
    torch.jit.script(model.eval()).save(tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    for size in ((64, 64), (33, 70)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(scripted(x), model(x), rtol=1e-5, atol=1e-6)


def test_torchscript_of_a_segmentor_says_what_to_use():
    with pytest.raises(NotImplementedError, match="use torch.jit.trace or torch.export"):
        torch.jit.script(BUILDERS["segmentor"]().eval())


@pytest.mark.parametrize(
    ("kind", "imports"),
    [("script", "torch, spatial_mamba_d2"), ("export", "spatial_mamba_d2, torch")],
)
def test_saved_graphs_need_the_package_and_no_more(kind, imports, tmp_path):
    model, x = BUILDERS["classifier"]().eval(), torch.randn(1, 3, 64, 64)
    path = tmp_path / "model.pt2"
    if kind == "export":
        torch.export.save(torch.export.export(model, (x,)), path)
        load = "torch.export.load(path).module()"
    else:
        torch.jit.script(model).save(path)
        load = "torch.jit.load(path)"
    with torch.no_grad():
        torch.save({"x": x, "y": model(x)}, tmp_path / "expected.pth")
    script = (
        f"import sys, {imports}\n"
        f"path, expected = sys.argv[1], torch.load(sys.argv[2])\nmodel = {load}\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(model(expected['x']), expected['y'])\n"
        "print('equal')\n"
    )
    words = [sys.executable, "-W", "ignore", "-c", script, path, tmp_path / "expected.pth"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
