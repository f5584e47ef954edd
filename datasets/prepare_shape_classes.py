#!/usr/bin/env python3
"""Write the generated sample data for classification, by default to datasets/shape_classes.

python datasets/prepare_shape_classes.py
python datasets/prepare_shape_classes.py --root /data/shape_classes --num-train 1000
"""

from __future__ import annotations

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main(argv: list[str] | None = None) -> None:
    from spatial_mamba_d2.data.shape_classes import generate_shape_classes

    parser = build_parser(__doc__)
    default = Path("datasets/shape_classes")
    parser.add_argument("--root", type=Path, default=default)
    parser.add_argument(
        "--num-train", type=int, default=100, metavar="N", help="images of each class"
    )
    parser.add_argument("--num-val", type=int, default=20, metavar="N", help="images of each class")
    parser.add_argument("--image-px", type=int, default=72, metavar="PX")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    folder = generate_shape_classes(**vars(parser.parse_args(argv)))
    print(f"Sample data are in {folder}")


if __name__ == "__main__":
    run_tool(main)
