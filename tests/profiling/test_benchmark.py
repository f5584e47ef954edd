"""The benchmark checks before it times, and reports what it ran."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from spatial_mamba_d2.models import build_backbone, build_upernet
from spatial_mamba_d2.profiling import (
    backbone_candidates,
    benchmark,
    candidates,
    exported,
    gemm_peak,
)
from spatial_mamba_d2.profiling.benchmark_report import plot, report, to_markdown
from spatial_mamba_d2.profiling.detector_layers import forward_all_layers
from spatial_mamba_d2.profiling.flops import official_flops
from spatial_mamba_d2.profiling.timing import InContext, call_seconds
from spatial_mamba_d2.system.processor import describe_processor

PREDICTION = pytest.param("prediction", marks=pytest.mark.long)  # torchvision's heads take a minute
NARROW = {"embed_dim": 16, "depths": (1, 1, 1, 1)}


@pytest.fixture
def small(monkeypatch):
    """A small peer and small sizes, so that a run takes seconds."""
    monkeypatch.setattr(backbone_candidates, "PEERS", {"timm convnext": "convnext_atto"})
    monkeypatch.setattr(gemm_peak, "GEMM_SIDE", 64)
    few = partial(forward_all_layers, num_proposals=50, num_detections=5)
    monkeypatch.setattr(candidates, "forward_all_layers", few)
    few = partial(candidates.prediction_candidates, num_proposals=50, num_detections=5)
    monkeypatch.setattr(benchmark, "prediction_candidates", few)
    monkeypatch.setattr(candidates, "build_upernet", partial(build_upernet, **NARROW, channels=64))
    for module in (benchmark, backbone_candidates):
        monkeypatch.setattr(module, "build_backbone", lambda name: build_backbone(name, **NARROW))


def read(path):
    assert path.with_suffix(".png").stat().st_size > 1000
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.mark.parametrize("device", benchmark.DEVICES)
@pytest.mark.parametrize(
    "task", ["op", "backbone", "train", "detector", "segmentation", PREDICTION]
)
def test_small_run(task, device, tmp_path, small):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if task in ("detector", "prediction"):
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    report(task, 64, 96, rounds=2, output=tmp_path, device=device)
    (path,) = tmp_path.glob("*.json")
    result, table = read(path)
    assert any(name.startswith("ours") for name in result["seconds"])
    assert len(result["seconds"]) >= 2
    for name, seconds in result["seconds"].items():
        least, most = result["spread"][name]
        assert 0 < least <= seconds <= most
        assert f"\n| {name} | {seconds:.4f} | " in table


@pytest.mark.slow
def test_exported_networks(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    networks = {"backbone": partial(build_backbone, "tiny", **NARROW)}
    monkeypatch.setattr(exported, "_NETWORKS", networks)
    report("export", 64, 96, rounds=2, output=tmp_path)
    result, _ = read(tmp_path / "benchmark_export_1x64x96.json")
    runtimes = {name.split()[0] for name in result["seconds"]}
    assert runtimes == {"ours,", "onnxruntime", "openvino"} and len(result["seconds"]) == 4


def test_a_run_for_each_number_of_threads(tmp_path, small):
    before = torch.get_num_threads()
    report("op", 16, 16, rounds=1, threads=[1, 2], output=tmp_path)
    torch.set_num_threads(before)
    for threads in (1, 2):
        result, _ = read(tmp_path / f"benchmark_op_1x16x16_{threads}threads.json")
        assert result["machine"]["threads"] == threads


def test_memory_is_what_a_call_adds():
    if benchmark.reset_peak_memory_mb() is None:
        pytest.skip("the peak cannot be reset here: that takes Linux and a writable /proc")
    calls = []

    def allocate(name, megabytes):
        calls.append(name)
        torch.ones(megabytes * 1_000_000, dtype=torch.uint8)

    measured = benchmark._measure(
        {"a": partial(allocate, "a", 50), "b": partial(allocate, "b", 150)}, 3, "cpu"
    )
    assert calls == ["a", "b"] * 6  # twice to warm up, once for the memory, three times for time
    assert 45 < measured["memory_mb"]["a"] < 100 < 145 < measured["memory_mb"]["b"] < 200


def test_backbones_are_measured_against_matrix_products(small):
    result = benchmark.run_benchmark("backbone", 64, 64, rounds=1)
    seconds, peak = result["seconds"], result["peak_gflops"]
    assert {"ours, optimised", "ours, optimised, bfloat16", "timm convnext"} <= seconds.keys()
    for name, value in peak.items():
        assert value == pytest.approx(2 * 64**3 / 1e9 / seconds[name])
    gflop = 2 * official_flops(build_backbone("tiny", **NARROW).eval(), (1, 3, 64, 64))["total"]
    for name, is_low in (("ours, optimised", False), ("ours, optimised, bfloat16", True)):
        best = max(rate for product, rate in peak.items() if ("bfloat16" in product) == is_low)
        assert result["peak_fraction"][name] == pytest.approx(gflop / seconds[name] / best)


def test_growth_over_pixels(small, tmp_path):
    result = benchmark.run_benchmark("growth", 64, 64, rounds=1, growth_px=(32, 64))
    assert list(result["seconds"]["ours, optimised"]) == [32**2, 64**2]
    assert result["exponent"].keys() == result["seconds"].keys()
    assert "| 32^2: s | 64^2: s | exponent |" in to_markdown(result)
    plot(result, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_exponent_of_a_power_law():
    assert benchmark._exponent({n: 3 * n**1.5 for n in (4, 16, 64)}) == pytest.approx(1.5)


def test_compiled_backbones_are_timed(small, monkeypatch):
    """Without compiling, which takes minutes; test_compile.py shows that they are one graph."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, disable=True))
    result = benchmark.run_benchmark("backbone", 64, 64, rounds=1, compile=True)
    expected = {"ours, torch.compile", "timm convnext, torch.compile"}
    expected |= {"ours, torch.compile, bfloat16 by autocast"}
    expected |= {"timm convnext, torch.compile, bfloat16 weights"}
    assert expected <= result["seconds"].keys()


def test_others_by_openvino_are_compared_and_timed(small):
    pytest.importorskip("openvino", reason="openvino is not installed")
    result = benchmark.run_benchmark("backbone", 64, 96, rounds=1, openvino=True)
    expected = {"timm convnext, OpenVINO", "timm convnext, OpenVINO, bfloat16"}
    assert expected <= result["seconds"].keys()


def test_openvino_computes_in_the_precision_that_it_is_given():
    pytest.importorskip("openvino", reason="openvino is not installed")
    torch.manual_seed(0)
    model = backbone_candidates._peer("convnext_atto", 64, 96).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)[-1]
    errors = [
        (
            (exported.in_openvino(model, image, dtype)() - expected).abs().max()
            / expected.abs().max()
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert errors[0] < 1e-5
    if "bfloat16" in describe_processor()["abilities"]:
        assert 1e-4 < errors[1] < 0.1


def test_openvino_that_is_missing_names_its_extra(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'spatial-mamba-d2\[openvino\]'"):
        benchmark.run_benchmark("backbone", 64, 96, rounds=1, openvino=True)


def test_training_in_both_precisions(small):
    result = benchmark.run_benchmark("train", 64, 96, batch=2, rounds=1)
    for name in ("ours, plain PyTorch operators", "timm convnext"):
        low = f"{name}, bfloat16 by autocast"
        assert result["seconds"].keys() >= {name, low}
        assert result["memory_mb"][low] > 0


def test_a_context_is_entered_before_the_clock_starts():
    events = []

    @contextmanager
    def context():
        events.append("enter")
        time.sleep(0.2)
        yield
        events.append("leave")

    call = InContext(lambda: events.append("call"), context)
    assert call_seconds(call, num_calls=2) < 0.1
    assert events == ["enter", "call", "call", "leave"]


@pytest.mark.parametrize("y", [[0.0, 1.0], [float("nan"), 0.0]])
def test_zeros_agree_with_nothing_else(y):
    candidates.check_agreement({"a": torch.zeros(2), "b": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="b differs from a by inf of the largest value"):
        candidates.check_agreement({"a": torch.zeros(2), "b": torch.tensor(y)})


def test_disagreement_is_an_error():
    with pytest.raises(RuntimeError, match=r"b differs from a by .* of the largest value"):
        candidates.check_agreement({"a": torch.ones(3), "b": torch.tensor([1.0, 1.0, 1.1])})
    with pytest.raises(RuntimeError):
        candidates.check_agreement({"a": torch.ones(1), "b": torch.tensor([float("nan")])})


def test_a_missing_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be one of cpu here, got 'cuda'"):
        benchmark.run_benchmark("op", 64, 64, device="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("fly", 64, 64), "task must be one of .*, prediction, segmentation, export, got 'fly'"),
     (("op", 0, 64), "height must be at least 1, got 0"),
     (("op", 64, 64, 1, 1, 0), "threads must be at least 1, got 0")],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.run_benchmark(*arguments)
