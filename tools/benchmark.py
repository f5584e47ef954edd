#!/usr/bin/env python3
"""Time our operators, backbone and detector next to others', on this machine's CPU or GPU.

python tools/benchmark.py --task backbone --size 640 896 --threads 1 2
python tools/benchmark.py --task grid  # where is plain PyTorch faster than our operators?
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.profiling.benchmark import DEVICES, TASKS
    from spatial_mamba_d2.profiling.benchmark_report import GRID, report

    parser = build_parser(__doc__)
    parser.add_argument("--task", choices=(*TASKS, GRID), default="backbone")
    size_help = "of the images; growth and grid have sizes of their own"
    parser.add_argument(
        "--size", type=int, nargs=2, default=(640, 896), metavar=("H", "W"), help=size_help
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[None], help="one run for each; grid: 1, 2, 4"
    )
    parser.add_argument("--compile", action="store_true", help="backbones by torch.compile too")
    parser.add_argument("--openvino", action="store_true", help="other backbones by OpenVINO too")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    parser.add_argument(
        "--keep-freed-memory",
        dest="keep_memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse freed memory for the next tensors, as our tools do (default: %(default)s)",
    )
    options = vars(parser.parse_args())
    report(options.pop("task"), *options.pop("size"), **options)


if __name__ == "__main__":
    run_tool(main)
