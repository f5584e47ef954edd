"""What the CUDA kernels cost, as tables: resources from NVRTC, DRAM bytes from a model.

See :mod:`.kernel_resources` and :mod:`.dram_model`. Nothing here needs a GPU or was timed on one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.ops.cuda.nvrtc import UnavailableError
from spatial_mamba_d2.profiling import dram_model
from spatial_mamba_d2.profiling.authors_traffic import (
    authors_forward,
    authors_training_forward,
)
from spatial_mamba_d2.profiling.dram_model import (
    BANDWIDTH_TB_S,
    Problem,
    halo_bytes,
    ssm_forward,
    stage_problems,
    total_bytes,
)
from spatial_mamba_d2.profiling.kernel_resources import (
    compile_all,
    over_budget,
    resource_table,
)
from spatial_mamba_d2.profiling.model_traffic import ModelFigures, model_figures
from spatial_mamba_d2.system.tables import markdown_table

_BOUNDS = [f"{device} >= us" for device in BANDWIDTH_TB_S]


def _bounds(num_bytes: int) -> list[str]:
    return [f"{num_bytes / bandwidth / 1e6:.0f}" for bandwidth in BANDWIDTH_TB_S.values()]


def dram_table() -> str:
    """One SSM core per stage, ours next to the authors', as Markdown."""
    rows = []
    for number, problem in enumerate(stage_problems(), start=1):
        half = problem._replace(element_bytes=2)
        sequences = [
            ("authors, eval", authors_forward(problem), None),
            ("authors, training", authors_training_forward(problem), None),
            ("ours, float32", ssm_forward(problem), halo_bytes(problem)),
            ("ours, bfloat16", ssm_forward(half), halo_bytes(half)),
        ]
        base = total_bytes(authors_forward(problem))
        for name, launches, halos in sequences:
            total = total_bytes(launches)
            rows.append(
                [
                    f"{number}, {name}",
                    f"{problem.height} x {problem.width} x {problem.dim}",
                    str(len(launches)),
                    f"{total / 1e6:.1f}",
                    f"{total / base:.2f}",
                    "" if halos is None else f"{(total + halos) / base:.2f}",
                    *_bounds(total),
                ]
            )
    header = ["stage", "map", "launches", "MB", "ratio", "with halos", *_BOUNDS]
    return markdown_table(header, rows)


def launch_table(problem: Problem) -> str:
    """Each launch of each operator, forward and backward, as Markdown."""
    rank = problem.dim // 32  # of the models
    operators = {
        "selective_scan": dram_model.scan_forward(problem),
        "selective_scan_backward": dram_model.scan_backward(problem),
        "state_fusion": dram_model.fusion_forward(problem),
        "state_fusion_backward": dram_model.fusion_backward(problem),
        "structure_aware_ssm": ssm_forward(problem),
        "structure_aware_ssm_backward": dram_model.ssm_backward(problem),
        "structure_aware_ssm_from_dt": dram_model.ssm_from_dt_forward(problem, rank),
        "structure_aware_ssm_from_dt_backward": dram_model.ssm_from_dt_backward(problem, rank),
        "depthwise_conv3x3": dram_model.conv_forward(problem),
        "depthwise_conv3x3_backward": dram_model.conv_backward(problem),
        "depthwise_conv3x3_gradients_": dram_model.conv_backward(problem),
        "depthwise_conv3x3_stride2": dram_model.conv_stride2_forward(problem),
        "depthwise_conv3x3_stride2_backward": dram_model.conv_stride2_backward(problem),
        "add_bias_": dram_model.add_bias(problem, residual=True),
        "depthwise_conv3x3_layer_norm": dram_model.conv_norm_forward(problem),
        "gated_layer_norm": dram_model.gate_forward(problem),
        "gated_layer_norm_backward": dram_model.gate_backward(problem),
        "gated_layer_norm_gradients_": dram_model.gate_gradients(problem),
        "gelu_gradients": dram_model.gelu_gradients(problem),
        "layer_norm_gradients": dram_model.layer_norm_gradients(problem),
    }
    rows = [
        [
            operator,
            launch.name,
            f"{launch.read_bytes / 1e6:.1f}",
            f"{launch.written_bytes / 1e6:.1f}",
            *_bounds(launch.num_bytes),
        ]
        for operator, launches in operators.items()
        for launch in launches
    ]
    return markdown_table(["operator", "launch", "read MB", "written MB", *_BOUNDS], rows)


def model_table(figures: ModelFigures) -> str:
    """Kernels and bytes of whole models, as Markdown."""
    rows = [
        [
            f"{model}, {task}, {dtype}",
            str(traffic["kernels"]),
            f"{traffic['gigabytes']:.2f}",
            *_bounds(round(traffic["gigabytes"] * 1e9)),
        ]
        for model, dtypes in figures.items()
        for dtype, tasks in dtypes.items()
        for task, traffic in tasks.items()
    ]
    return markdown_table(["backbone", "kernels", "GB", *_BOUNDS], rows)


def write_model_figures(path: Path) -> None:
    """Count whole models, print the table, and save ``{"models": ...}`` as JSON.

    Raises:
        ValueError: ``path`` cannot be written.
    """
    check_outputs([path], [], overwrite=True)
    figures = model_figures()
    print(model_table(figures))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"models": figures}, indent=2) + "\n")


def report(output: Path, architectures: Sequence[int]) -> int:
    """Print the tables and save them and all figures as ``output``/cuda_report.{md,json}.

    Args:
        output: a folder.
        architectures: for which the kernels are compiled, such as 90.

    Returns:
        0, or 1 if a kernel spills registers or exceeds its budget of them.

    Raises:
        ValueError: ``output`` is a file, or cannot be written.
    """
    check_outputs([output / "cuda_report.md"], [], overwrite=True)
    parts = [
        "DRAM bytes of one SSM core, from u, delta, B, C to y (a model; nothing was timed)",
        dram_table(),
        "DRAM bytes of every launch at stage 1 of tiny, 800 x 1280 pixels, float32",
        launch_table(stage_problems()[0]),
    ]
    kernels, problems = [], []
    try:
        kernels = compile_all(architectures)
        problems = over_budget(kernels)
        parts += ["Registers per thread, occupancy", resource_table(kernels), *problems]
    except UnavailableError as error:
        parts.append(f"No resources: {error}")
    text = "\n\n".join(parts)
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "cuda_report.md").write_text(text + "\n")
    figures = {
        "kernels": [{**k._asdict(), "occupancy": k.occupancy} for k in kernels],
        "stages": [
            {
                "problem": problem._asdict(),
                "ours": _launch_figures(ssm_forward(problem)),
                "authors": _launch_figures(authors_forward(problem)),
            }
            for problem in stage_problems()
        ],
    }
    (output / "cuda_report.json").write_text(json.dumps(figures, indent=2))
    return 1 if problems else 0


def _launch_figures(launches: list[dram_model.Launch]) -> list[dict[str, object]]:
    return [
        {
            "name": launch.name,
            "read_bytes": launch.read_bytes,
            "written_bytes": launch.written_bytes,
            "reads": [operand._asdict() for operand in launch.reads],
            "writes": [operand._asdict() for operand in launch.writes],
        }
        for launch in launches
    ]
