"""Kernels and bytes of whole models."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spatial_mamba_d2 import ops
from spatial_mamba_d2.models.optimized import optimize_for_inference
from spatial_mamba_d2.models.spatial_mamba import Block
from spatial_mamba_d2.profiling import cuda_report, dram_model, model_traffic
from spatial_mamba_d2.profiling.dram_model import Problem
from spatial_mamba_d2.profiling.model_traffic import (
    Row,
    count_inference,
    count_training_step,
    model_figures,
)

MAP = 4 * 5 * 7 * 64  # bytes of a map [1, 5, 7, 64] in float32


def on_meta(make):
    with torch.device("meta"):
        return make(), torch.empty(1, 5, 7, 64)


def test_every_tensor_counts_once():
    model, x = on_meta(lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU()))
    assert count_inference(model, x).rows == [
        Row("addmm", 1, MAP + 4 * (128 + 128 * 64), 2 * MAP),
        Row("gelu", 1, 2 * MAP, 2 * MAP),
    ]


def test_a_training_step_has_the_gradients_of_input_weight_and_bias():
    model, x = on_meta(lambda: nn.Linear(64, 128))
    rows = count_training_step(model, x.requires_grad_()).rows
    assert [row.name for row in rows] == ["addmm", "mm", "mm", "sum"]
    assert rows[-1] == Row("sum", 1, 2 * MAP, 4 * 128)


def test_a_convolutions_bias_is_another_kernel():
    model, x = on_meta(lambda: nn.Conv2d(64, 64, 1, bias=True))
    x = x.permute(0, 3, 1, 2)
    weight, bias = 4 * 64 * 64, 4 * 64
    assert count_inference(model, x).rows == [
        Row("convolution", 2, MAP + weight + bias + MAP, 2 * MAP)
    ]


def test_a_block_has_the_launches_of_its_operators():
    block, x = on_meta(lambda: Block(64, 2.0, 4.0, 0.0))
    narrow, wide = Problem(1, 5, 7, 64), Problem(1, 5, 7, 128)
    rows = [row for row in count_inference(block, x).rows if ": " in row.name]
    expected = [
        *dram_model.conv_forward(narrow),
        *dram_model.conv_forward(wide),
        *dram_model.ssm_from_dt_forward(wide, rank=4),
        *dram_model.gate_forward(wide),
        *dram_model.conv_forward(narrow),
    ]
    assert [(row.name.split(": ")[1], *row[2:]) for row in rows] == [
        (launch.name, launch.read_bytes, launch.written_bytes) for launch in expected
    ]


class _GradientsInBfloat16(nn.Module):
    def forward(self, grad):
        x, channels = grad.bfloat16(), grad.new_empty(64)
        outputs = ops.gelu_gradients(grad, x)
        return outputs, ops.layer_norm_gradients(grad, grad, x, channels, channels)


def test_the_dtype_is_that_of_the_map_that_is_differentiated():
    rows = count_inference(*on_meta(_GradientsInBfloat16)).rows
    p = Problem(1, 5, 7, 64, element_bytes=2)
    launches = [*dram_model.gelu_gradients(p), *dram_model.layer_norm_gradients(p)]
    assert [row for row in rows if ": " in row.name] == [
        Row(f"{launch.name}: {launch.name}", 1, launch.read_bytes, launch.written_bytes)
        for launch in launches
    ]
    casts = 1 + 1 + 2  # of x, and of the gradients for each operator
    assert rows.count(Row("_to_copy", 1, MAP, MAP // 2)) == casts


LAYERS = {
    "convolutions": lambda: nn.Sequential(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
    "norm and products": lambda: nn.Sequential(nn.LayerNorm(64), Block(64, 2.0, 4.0, 0.0).mlp),
}


@pytest.fixture(scope="module")
def fake_cuda() -> None:
    try:
        with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
            nn.Conv2d(5, 6, 3)(torch.empty(1, 5, 7, 64))
    except RuntimeError as error:
        pytest.skip(f"PyTorch {torch.__version__} has fake CUDA tensors with a GPU only: {error}")


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_is_that_of_cuda(name, fake_cuda):
    """PyTorch's own, on fake CUDA tensors; without our operators, which need memory."""
    model, x = on_meta(LAYERS[name])
    model.eval()
    expected = count_inference(model, x, torch.bfloat16).rows
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model, x = LAYERS[name]().eval(), torch.empty(1, 5, 7, 64)
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)  # torch.autocast refuses without a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with model_traffic._Counter(None) as counter:
                model(x)
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
    assert sorted(counter.rows) == sorted(expected)  # casts in another order


def test_an_optimised_model_moves_less():
    model, image = model_traffic._build("", (64, 64)), torch.empty(1, 3, 64, 64, device="meta")
    plain = count_inference(model, image)
    optimized = count_inference(optimize_for_inference(model), image)
    assert optimized.kernels < plain.kernels and optimized.num_bytes < plain.num_bytes


@pytest.mark.slow
def test_figures_of_all_models(tmp_path, capsys):
    cuda_report.write_model_figures(tmp_path / "models.json")
    figures = json.loads((tmp_path / "models.json").read_text())["models"]
    assert list(figures) == ["ours", "convnext_tiny", "swin_tiny"]
    for dtypes in figures.values():
        for dtype in ("float32", "bfloat16"):
            inference, training = dtypes[dtype]["inference"], dtypes[dtype]["training"]
            assert 2 < training["gigabytes"] / inference["gigabytes"] < 6
            assert training["kernels"] > inference["kernels"]
    for task in ("inference", "training"):
        halves = figures["ours"]["bfloat16"][task]["gigabytes"]
        assert halves < 0.6 * figures["ours"]["float32"][task]["gigabytes"]
    assert figures["ours"]["float32"]["inference"]["kernels"] <= 400
    assert cuda_report.model_table(figures) in capsys.readouterr().out


def test_figures_follow_the_size_of_the_image(monkeypatch):
    monkeypatch.setattr(model_traffic, "BACKBONES", {"ours": ""})
    small, large = model_figures(64, 64), model_figures(128, 128)
    for dtype in ("float32", "bfloat16"):
        a, b = (x["ours"][dtype]["inference"] for x in (small, large))
        assert b["kernels"] == a["kernels"] and b["gigabytes"] > a["gigabytes"]
