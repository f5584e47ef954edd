#!/usr/bin/env python3
"""Report on trained models: scores with intervals, errors, calibration, worst images, comparison.

    python tools/report.py output/mine --html report.html
    python tools/report.py output/mine output/other --json report.json --html report.html
    python tools/report.py model_final.pth --data my/data --html report.html

RUN is the folder of a training, whose best checkpoint counts, or a checkpoint. By default the test
set is that of each run's configuration. Runs on the same data are compared in pairs.
"""

from pathlib import Path

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_parser, log_to_stdout, run_tool


def main() -> None:
    from spatial_mamba_d2.reporting import report

    keep_freed_memory()
    parser = build_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, metavar="PATH", help="labelled images in any format")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--max-images", type=int, metavar="N", help="only the first ones")
    args = parser.parse_args()
    log_to_stdout()
    report(
        args.runs, data=args.data, html=args.html, json_file=args.json, device=args.device,
        max_images=args.max_images,
    )  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
