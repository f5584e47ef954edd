#!/usr/bin/env python3
"""Registers, occupancy and modelled DRAM bytes of the CUDA kernels; needs no GPU.

python tools/cuda_report.py --output output/cuda_report --architectures 80 90 120
python tools/cuda_report.py --json models.json
"""

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main() -> int:
    from spatial_mamba_d2.profiling.cuda_report import report, write_model_figures

    parser = build_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/cuda_report"))
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=[80, 90], metavar="N", help="80 is sm_80"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="instead: count kernels and bytes of whole backbones, ours and others, into this file",
    )
    options = parser.parse_args()
    if options.json:
        write_model_figures(options.json)
        return 0
    return report(options.output, options.architectures)


if __name__ == "__main__":
    run_tool(main)
