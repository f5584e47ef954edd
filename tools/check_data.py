#!/usr/bin/env python3
"""Check labelled images before training: files, labels, classes, duplicates and leaks.

    python tools/check_data.py my/data
    python tools/check_data.py my/data --json findings.json --html findings.html

The format is recognised: COCO, YOLO, labelme, Pascal VOC, label maps in folders, class folders,
data saved by Hugging Face's datasets. PATH is a folder, COCO's JSON or YOLO's data.yaml.

Exit code: 0 nothing was found, 1 there are findings, 2 the data are not usable.
"""

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main() -> int:
    from spatial_mamba_d2.data.checks.tool import run
    from spatial_mamba_d2.data.formats import TASKS

    parser = build_parser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--task", choices=TASKS, help="default: that of the recognised format")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with examples")
    return run(parser.parse_args())


if __name__ == "__main__":
    run_tool(main)
