"""The grid compares what agrees, and says where plain PyTorch is faster."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from spatial_mamba_d2.models import build_backbone
from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.profiling import benchmark_report, grid, grid_candidates
from spatial_mamba_d2.profiling.benchmark_report import report
from spatial_mamba_d2.profiling.grid import LIMIT, grid_table, run_grid
from spatial_mamba_d2.profiling.grid_candidates import (
    FORWARD,
    SUBJECTS,
    TRAINING,
    Setting,
    Subject,
)
from spatial_mamba_d2.profiling.timing import InContext

pytestmark = pytest.mark.skipif(
    _extension.WHY_NOT_COMPILED is not None, reason="there are no compiled kernels"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A narrow network and few rounds, so that a run takes seconds."""
    narrow = partial(build_backbone, embed_dim=16, depths=(1, 1, 1, 1))
    monkeypatch.setattr(grid_candidates, "build_backbone", narrow)
    monkeypatch.setattr(grid, "_MAX_ROUNDS", 3)
    yield
    for cached in (grid_candidates._network, grid_candidates._optimised_network):
        cached.cache_clear()


def test_all_subjects_agree_in_a_small_setting():
    result = run_grid(threads=[1], batches=[2], sizes=[(32, 40)])
    settings = result["settings"]
    assert {found["subject"] for found in settings} == {subject.name for subject in SUBJECTS}
    steps = sum(len(subject.max_pixels) for subject in SUBJECTS)
    assert len(settings) == 2 * steps  # float32 and bfloat16
    for found in settings:
        assert found["ratio"] > 0 and found["ours_s"] > 0 and found["plain_s"] > 0
        assert found["rounds"] in (3, 3 * grid._CONFIRMATION)


def test_plain_pytorch_runs_the_plain_kernels():
    setting = Setting(TRAINING, torch.float32, 1, 1, 16, 16)
    compiled = [s for s in SUBJECTS if s.name.startswith(("structure", "gated", "backbone"))]
    for subject in compiled:
        ours, plain = subject.build(setting)
        assert isinstance(plain, InContext) and not isinstance(ours, InContext)
        assert plain.context is _extension.without_compiled_kernels


def test_results_that_differ_are_an_error():
    wrong = Subject(
        "wrong", lambda _: (lambda: torch.ones(2), lambda: torch.zeros(2)), {FORWARD: 10**6}
    )
    with pytest.raises(RuntimeError, match="wrong, Setting.*output 0 differs from plain PyTorch"):
        run_grid(threads=[1], batches=[1], sizes=[(32, 32)], subjects=[wrong])


def test_large_settings_and_missing_steps_are_left_out(monkeypatch):
    subject = Subject("s", lambda _: (torch.ones, torch.ones), {FORWARD: 2 * 32 * 32})
    settings = grid._settings([subject], [1], [1, 2, 3], [(32, 32), (32, 64)])
    found = [(s.step, s.batch, s.width) for _, s in settings if s.dtype == torch.float32]
    assert found == [(FORWARD, 1, 32), (FORWARD, 1, 64), (FORWARD, 2, 32)]


@pytest.mark.parametrize(("ratio", "num_measurements"), [(LIMIT, 1), (1.1, 2)])
def test_where_plain_pytorch_is_faster_is_measured_again(monkeypatch, ratio, num_measurements):
    """By more rounds, with a clock by which ours takes ``ratio`` times as long."""
    measured = []

    def call_seconds(candidate, device="cpu", num_calls=1):
        measured.append(candidate)
        return 1.0 if candidate is plain else ratio

    ours, plain = (lambda: torch.ones(1)), (lambda: torch.ones(1))
    monkeypatch.setattr(grid, "call_seconds", call_seconds)
    subject = Subject("s", lambda _: (ours, plain), {FORWARD: 10**6})
    result = run_grid(threads=[1], batches=[1], sizes=[(32, 32)], subjects=[subject])
    for found in result["settings"]:
        assert found["ratio"] == ratio
        assert found["rounds"] == (3 if num_measurements == 1 else 3 * grid._CONFIRMATION)
    assert len(measured) == 2 * (2 + 6 + (num_measurements - 1) * (2 + 6 * grid._CONFIRMATION))


def found(subject, ratio, threads=1, batch=1):
    return {"subject": subject, "step": FORWARD, "dtype": "float32", "threads": threads,
            "batch": batch, "height": 32, "width": 64, "ratio": ratio, "ours_s": ratio,
            "plain_s": 1.0, "rounds": 3}  # fmt: skip


def test_the_table_names_the_worst_and_counts():
    settings = [found("a", 0.5), found("a", 1.2, batch=8), found("b", 1.03, threads=2),
                found("c", LIMIT)]  # fmt: skip
    lines = grid_table(settings).splitlines()
    assert lines[0] == "|  | step | dtype | threads | 1 x 32 x 64 | 8 x 32 x 64 |"
    assert lines[2] == "| a | forward | float32 | 1 | 0.50 | **1.20** |"
    assert lines[3] == "| b | forward | float32 | 2 | **1.03** |  |"
    assert lines[4] == "| c | forward | float32 | 1 | 1.02 |  |"
    assert lines[-2].startswith("Worst: 1.20, a, forward, float32, 1 threads, 8 x 32 x 64")
    assert lines[-1] == "Plain PyTorch is faster (ratio above 1.02) in 2 of 4 settings."


def test_the_report_has_one_table_for_all_threads(tmp_path, monkeypatch, capsys):
    few = partial(run_grid, batches=[1], sizes=[(32, 32)], subjects=SUBJECTS[:1])
    monkeypatch.setattr(benchmark_report, "run_grid", few)
    threads = torch.get_num_threads()
    report("grid", 64, 64, threads=[1, 2], output=tmp_path)
    assert torch.get_num_threads() == threads
    result = json.loads((tmp_path / "benchmark_grid.json").read_text())
    assert [found["threads"] for found in result["settings"]] == [1, 2] * 4
    text = (tmp_path / "benchmark_grid.md").read_text()
    assert "1 or 2 threads" in text and capsys.readouterr().out == text
    assert text.rstrip().endswith("of 8 settings.")


def test_threads_are_by_default_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(grid, "_num_cores", lambda: 2)
    subject = Subject("s", lambda _: (lambda: torch.ones(1),) * 2, {FORWARD: 10**6})
    result = run_grid(batches=[1], sizes=[(8, 8)], subjects=[subject])
    assert {found["threads"] for found in result["settings"]} == {1, 2}


def test_bad_arguments_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        run_grid(threads=[1, 0])
    with pytest.raises(ValueError, match="sizes must be at least 1, got -2"):
        run_grid(threads=[1], sizes=[(8, -2)])
    with pytest.raises(ValueError, match="device must be cpu for the task grid, got 'cuda'"):
        report("grid", 8, 8, device="cuda", output=tmp_path)
    monkeypatch.setattr(_extension, "WHY_NOT_COMPILED", "no compiler")
    with pytest.raises(RuntimeError, match="there are none: no compiler"):
        run_grid(threads=[1])
