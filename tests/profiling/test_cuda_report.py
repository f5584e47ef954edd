"""The report on the CUDA kernels: its tables and files."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from spatial_mamba_d2.ops import _extension
from spatial_mamba_d2.ops.cuda.nvrtc import UnavailableError
from spatial_mamba_d2.profiling import cuda_report
from spatial_mamba_d2.profiling.dram_model import stage_problems
from spatial_mamba_d2.profiling.kernel_resources import compile_all


def test_the_table_in_the_docs_is_the_models(root):
    assert cuda_report.dram_table() in (root / "docs/cuda.md").read_text(encoding="utf-8")


def test_every_operator_has_its_launches():
    lines = cuda_report.launch_table(stage_problems()[0]).splitlines()[2:]
    operators = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert {name: operators.count(name) for name in operators} == {
        "selective_scan": 3,
        "selective_scan_backward": 5,
        "state_fusion": 1,
        "state_fusion_backward": 2,
        "structure_aware_ssm": 3,
        "structure_aware_ssm_backward": 7,
        "structure_aware_ssm_from_dt": 3,
        "structure_aware_ssm_from_dt_backward": 7,
        "depthwise_conv3x3": 1,
        "depthwise_conv3x3_backward": 1,
        "depthwise_conv3x3_gradients_": 1,
        "depthwise_conv3x3_stride2": 1,
        "depthwise_conv3x3_stride2_backward": 1,
        "add_bias_": 1,
        "depthwise_conv3x3_layer_norm": 1,
        "gated_layer_norm": 1,
        "gated_layer_norm_backward": 1,
        "gated_layer_norm_gradients_": 1,
        "gelu_gradients": 1,
        "layer_norm_gradients": 1,
    }


@pytest.mark.skipif(bool(_extension.why_no_cuda()), reason="no NVRTC")
@pytest.mark.slow
def test_the_report_is_written(tmp_path, capsys, monkeypatch):
    """With one dtype, because test_kernel_resources.py compiles the others."""
    monkeypatch.setattr(cuda_report, "compile_all", partial(compile_all, dtypes=[torch.float32]))
    assert cuda_report.report(tmp_path, [90]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "cuda_report.md").read_text() == printed
    figures = json.loads((tmp_path / "cuda_report.json").read_text())
    assert [len(stage["ours"]) for stage in figures["stages"]] == [3] * 4
    assert {kernel["architecture"] for kernel in figures["kernels"]} == {"9.0"}
    launch = figures["stages"][0]["ours"][-1]
    assert launch["writes"] == [{"name": "y", "shape": [1, 200, 320, 128], "element_bytes": 4}]
    assert launch["written_bytes"] == 4 * 200 * 320 * 128


def test_a_file_in_place_of_the_folder_is_named_before_any_work(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/taken must be a folder, and is a file"):
        cuda_report.report(tmp_path / "taken", [90])
    assert capsys.readouterr().out == ""


def test_a_missing_nvrtc_is_reported(tmp_path, capsys, monkeypatch):
    def compile_all(architectures):
        raise UnavailableError("NVRTC is not found")

    monkeypatch.setattr(cuda_report, "compile_all", compile_all)
    assert cuda_report.report(tmp_path, [90]) == 0
    assert "No resources: NVRTC is not found" in capsys.readouterr().out
