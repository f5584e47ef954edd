#!/usr/bin/env python3
"""States of a chosen block before and after fusion, as figures.

    python tools/plot_states.py --weights spatialmamba_tiny.pth --stage 1 --block 2 \
        --channels 0 7 --input photo.jpg --output output/states

Without --weights the weights are random, without --input the images are generated.
"""

import logging
from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.explain.cli import add_image_arguments
    from spatial_mamba_d2.explain.states import plot_states

    parser = build_parser(__doc__)
    parser.add_argument("--model", default="spatial_mamba_tiny", metavar="NAME")
    parser.add_argument("--weights", type=Path, metavar="FILE")
    parser.add_argument("--stage", type=int, default=1, help="1..4 (%(default)s)")
    parser.add_argument("--block", type=int, default=1, help="of the stage, from 1 (%(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=[], help="to draw, from 0")
    add_image_arguments(parser, num_images=4)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plot_states(**vars(args))


if __name__ == "__main__":
    run_tool(main)
