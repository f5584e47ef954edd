#!/usr/bin/env python3
"""Write generated scenes with thousands of small objects, by default to datasets/cells.

python datasets/prepare_cells.py
python datasets/prepare_cells.py --root /data/cells --num-objects 5000 --image-px 1600
"""

from __future__ import annotations

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main(argv: list[str] | None = None) -> None:
    from spatial_mamba_d2.data.cells import generate_cells

    parser = build_parser(__doc__)
    parser.add_argument("--root", type=Path, default=Path("datasets/cells"))
    parser.add_argument("--num-train", type=int, default=16, metavar="N")
    parser.add_argument("--num-val", type=int, default=4, metavar="N")
    parser.add_argument("--image-px", type=int, default=1024, metavar="N")
    parser.add_argument("--num-objects", type=int, default=2000, metavar="N")
    parser.add_argument("--cell-px", type=int, default=14, metavar="N", help="mean diameter")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = vars(parser.parse_args(argv))
    print(f"Sample data are in {generate_cells(**options)}")


if __name__ == "__main__":
    run_tool(main)
