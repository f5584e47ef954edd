#!/usr/bin/env python3
"""Write the generated sample data, by default to datasets/shapes.

python datasets/prepare_shapes.py
python datasets/prepare_shapes.py --root /data/shapes --num-train 5000 --image-px 256 384
"""

from __future__ import annotations

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main(argv: list[str] | None = None) -> None:
    from spatial_mamba_d2.data.shapes import generate_shapes

    parser = build_parser(__doc__)
    parser.add_argument("--root", type=Path, default=Path("datasets/shapes"))
    parser.add_argument("--num-train", type=int, default=1000, metavar="N")
    parser.add_argument("--num-val", type=int, default=100, metavar="N")
    parser.add_argument("--image-px", type=int, nargs=2, default=(128, 192), metavar=("MIN", "MAX"))
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = vars(parser.parse_args(argv))
    options["image_px"] = tuple(options["image_px"])
    print(f"Sample data are in {generate_shapes(**options)}")


if __name__ == "__main__":
    run_tool(main)
