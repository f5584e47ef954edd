"""The benchmark checks before it times, and reports what it ran."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

from spatial_mamba_d2.models import build_backbone
from spatial_mamba_d2.profiling import benchmark
from spatial_mamba_d2.profiling.flops import official_flops

NARROW = {"embed_dim": 16, "depths": (1, 1, 1, 1)}


@pytest.fixture
def small(monkeypatch):
    """A small peer and small sizes, so that a run takes seconds."""
    monkeypatch.setattr(benchmark, "PEERS", {"timm convnext": "convnext_atto"})
    monkeypatch.setattr(benchmark, "GEMM", 64)
    monkeypatch.setattr(benchmark, "build_backbone", lambda name: build_backbone(name, **NARROW))


def read(folder):
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 1000
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.mark.parametrize("device", benchmark.DEVICES)
@pytest.mark.parametrize("task", ["op", "backbone", "train", "detector"])
def test_small_run(task, device, tmp_path, small):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if task == "detector":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    benchmark.main(task, 64, 96, 1, 2, None, tmp_path, device)
    result, table = read(tmp_path)
    assert any(name.startswith("ours") for name in result["seconds"])
    assert len(result["seconds"]) >= 2
    for name, seconds in result["seconds"].items():
        least, most = result["spread"][name]
        assert 0 < least <= seconds <= most
        assert f"\n| {name} | {seconds:.4f} | " in table


def test_backbones_are_held_against_matrix_products(small):
    result = benchmark.run_benchmark("backbone", 64, 64, rounds=1)
    seconds, peak = result["seconds"], result["peak_gflops"]
    assert {"ours, optimised", "ours, optimised, bfloat16", "timm convnext"} <= seconds.keys()
    for name, value in peak.items():
        assert value == pytest.approx(2 * 64**3 / 1e9 / seconds[name])
    gflop = 2 * official_flops(build_backbone("tiny", **NARROW).eval(), (1, 3, 64, 64))["total"]
    expected = gflop / seconds["ours, optimised"] / max(peak.values())
    assert result["peak_fraction"]["ours, optimised"] == pytest.approx(expected)


def test_growth_over_pixels(small, tmp_path):
    result = benchmark.run_benchmark("growth", 64, 64, rounds=1, growth_px=(32, 64))
    assert list(result["seconds"]["ours, optimised"]) == [32**2, 64**2]
    assert result["exponent"].keys() == result["seconds"].keys()
    assert "| 32^2: s | 64^2: s | exponent |" in benchmark.to_markdown(result)
    benchmark.plot(result, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_exponent_of_a_power_law():
    assert benchmark._exponent({n: 3 * n**1.5 for n in (4, 16, 64)}) == pytest.approx(1.5)


def test_saved_bytes_count_each_storage_once_and_no_weights():
    layer = nn.Linear(8, 8)
    x = torch.randn(100, 8)

    def function():
        y = layer(x)  # saves x, and the weight
        return (y * y[:50].repeat(2, 1)).exp()  # saves y, the repeated half and the result

    assert benchmark.saved_bytes(layer, function) == 4 * x.nbytes


@pytest.mark.usefixtures("narrow")
def test_compiled_backbones_are_timed(small, monkeypatch):
    """By a backend that traces and compiles nothing, which would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    result = benchmark.run_benchmark("backbone", 64, 64, rounds=1, compile=True)
    assert {"ours, torch.compile", "timm convnext, torch.compile"} <= result["seconds"].keys()


def test_disagreement_is_an_error():
    with pytest.raises(RuntimeError, match=r"b differs from a by .* of the largest value"):
        benchmark._check({"a": torch.ones(3), "b": torch.tensor([1.0, 1.0, 1.1])})
    with pytest.raises(RuntimeError):
        benchmark._check({"a": torch.ones(1), "b": torch.tensor([float("nan")])})


def test_a_missing_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be one of cpu here, got 'cuda'"):
        benchmark.run_benchmark("op", 64, 64, device="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("fly", 64, 64), "task must be one of op, backbone, train, growth, detector, got 'fly'"),
     (("op", 0, 64), "height must be at least 1, got 0")],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.run_benchmark(*arguments)
