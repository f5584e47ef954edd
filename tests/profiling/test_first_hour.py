"""The first hour on a GPU, rehearsed on the CPU; and in the emulator, where that has kernels."""

from __future__ import annotations

import json

import pytest
import torch

from spatial_mamba_d2.profiling import first_hour, first_hour_steps
from spatial_mamba_d2.profiling.first_hour import run_hour, run_step, to_markdown
from spatial_mamba_d2.profiling.first_hour_steps import STEPS, Settings
from tests.ops import emulator

SMALL = Settings("cpu", 64, 64, 64, 1, 1, "test")


@pytest.fixture(autouse=True)
def small_models(test_variant, monkeypatch):
    monkeypatch.setattr(first_hour_steps, "PEERS", {"timm convnext_atto": "convnext_atto"})


@pytest.mark.parametrize("name", ["machine", "agreement", "inference", "training", "profile"])
def test_a_step_runs_on_the_cpu(name):
    result = run_step(name, SMALL)
    assert result["status"] == "done", result
    assert result["step"] == name and result["settings"]["device"] == "cpu"
    json.dumps(result)
    assert f"## {name}" in to_markdown([result])


def test_other_backbones_are_measured_next_to_ours():
    rows = run_step("inference", SMALL)["result"]["rows"]
    assert {row["backbone"] for row in rows} >= {
        "ours, float32",
        "ours, optimised, bfloat16",
        "timm convnext_atto, bfloat16 by autocast",
    }
    assert all(row["ms"] > 0 for row in rows)


def test_every_launch_has_its_bound():
    assert "no kernels for cpu" in run_step("kernels", SMALL)["result"]["left out"]
    with emulator.emulated_cuda():
        result = run_step("kernels", SMALL._replace(height=32, width=32))
    assert result["status"] == "done", result
    rows = result["result"]["launches"]
    names = {row["kernel"] for row in rows}
    assert names >= {"reduce", "apply_adjoint", "conv3x3_stride2_backward", "add_bias"}
    assert all(row["bound us"] > 0 and row["us"] > 0 for row in rows)
    assert {row["stage"] for row in rows} == {1, 2, 3, 4}


def test_a_wrong_result_is_a_failure(monkeypatch):
    monkeypatch.setattr(first_hour_steps, "_error", lambda *_: 0.5)
    result = run_step("agreement", SMALL)
    assert result["status"] == "failed"
    assert "features differ by 5.0e-01 of the largest value" in result["error"]
    assert "Failed: features differ" in to_markdown([result])


@pytest.fixture
def steps(monkeypatch):
    """Two steps, of which one fails, and the calls of both."""
    calls = []

    def good(settings):
        calls.append("good")
        return {"rows": [{"a": 1, "b": 0.123456}, {"a": "x|y"}], "note": "text"}

    def bad(settings):
        calls.append("bad")
        raise RuntimeError("no luck")

    monkeypatch.setattr(first_hour, "STEPS", {"bad": (bad, 9), "good": (good, 9)})
    return calls


def test_a_failure_stops_no_other_step_and_what_is_done_is_kept(steps, tmp_path):
    assert run_hour(tmp_path, SMALL, ["bad", "good"]) == 1
    assert steps == ["bad", "good"]
    report = (tmp_path / "first_hour.md").read_text()
    assert "| bad | failed |" in report and "Failed: no luck" in report
    assert "| 1 | 0.1235 |" in report and "x/y" in report
    both = json.loads((tmp_path / "first_hour.json").read_text())
    assert [result["status"] for result in both] == ["failed", "done"]
    # Again: only what failed.
    assert run_hour(tmp_path, SMALL, ["bad", "good"]) == 1
    assert steps == ["bad", "good", "bad"]
    # With other settings, or if a file is damaged: everything.
    run_hour(tmp_path, SMALL._replace(batch=2), ["good"])
    (tmp_path / "good.json").write_text("{")
    run_hour(tmp_path, SMALL._replace(batch=2), ["good"])
    assert steps[3:] == ["good", "good"]


def test_an_unknown_step_is_named(tmp_path):
    with pytest.raises(ValueError, match="a step must be one of machine, .*, got 'x'"):
        run_hour(tmp_path, SMALL, ["x"])


def test_the_tool_runs_a_step_in_a_process_of_its_own(run_tool, tmp_path):
    words = ["--device", "cpu", "--steps", "machine", "--output", tmp_path / "hour"]
    done = run_tool("gpu_first_hour.py", *words)
    assert done.returncode == 0, done.stderr
    assert "machine: done" in done.stdout
    (result,) = json.loads((tmp_path / "hour/first_hour.json").read_text())
    assert result["result"]["torch"] == torch.__version__


def test_a_step_that_hangs_or_crashes_is_a_failure(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    monkeypatch.setitem(STEPS, "machine", (STEPS["machine"][0], 1))
    program.write_text("import time; time.sleep(60)")
    hung = first_hour._in_process("machine", SMALL, tmp_path, program)
    assert (hung["status"], hung["error"]) == ("failed", "not done after 1 seconds")
    program.write_text("raise SystemExit(3)")
    crashed = first_hour._in_process("machine", SMALL, tmp_path, program)
    assert crashed["error"].startswith("exit code 3")
