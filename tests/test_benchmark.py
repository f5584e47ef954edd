"""The benchmark checks before it times, and reports what it ran."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from spatial_mamba_d2 import benchmark


@pytest.mark.parametrize("device", benchmark.DEVICES)
@pytest.mark.parametrize("task", benchmark.TASKS)
def test_small_run(task, device, tmp_path, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if task == "detector":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    monkeypatch.setattr(benchmark, "PEERS", {"timm convnext": "convnext_atto"})
    monkeypatch.setattr(benchmark, "GROWTH_SIDES", (32, 64, 96))
    benchmark.main(task, 64, 96, 1, 2, None, tmp_path, device)
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert any(name.startswith("ours") for name in result["seconds"])
    assert len(result["seconds"]) >= 2
    for name, seconds in result["seconds"].items():
        least, most = result["spread"][name]
        assert 0 < least <= seconds <= most
    table = path.with_suffix(".md").read_text()
    assert table.count("\n| ours") >= 1
    wanted = {"backbone": "Best matrix product", "train": "Kept for the", "growth": "Latency grows"}
    if device == "cpu" and task in wanted:
        assert wanted[task] in table
        assert all(0 < share < 1.5 for share in result.get("gemm_share", {}).values())
    if importlib.util.find_spec("matplotlib"):
        assert path.with_suffix(".png").stat().st_size > 1000


def test_the_exponent_of_growth():
    assert benchmark._exponent({2: 3.0, 4: 12.0, 8: 48.0}) == pytest.approx(1)
    assert benchmark._exponent({2: 3.0, 4: 24.0, 8: 192.0}) == pytest.approx(1.5)


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
