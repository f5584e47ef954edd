#!/usr/bin/env python3
"""States of a chosen block before and after fusion, as pictures.

    python tools/plot_states.py --weights spatialmamba_tiny.pth --stage 1 --block 2 \
        --channels 0 7 --input photo.jpg --output output/states

Without --weights they are random, without --input the pictures are generated.
"""

import argparse
import logging
from pathlib import Path

from spatial_mamba_d2.explain.states import plot_states


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="spatial_mamba_tiny", metavar="NAME")
    parser.add_argument("--weights", type=Path, metavar="FILE")
    parser.add_argument("--stage", type=int, default=1, help="1..4 (%(default)s)")
    parser.add_argument("--block", type=int, default=1, help="of the stage, from 1 (%(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", default=[], help="to draw, from 0")
    parser.add_argument("--input", nargs="+", default=[], type=Path, help="images and folders")
    parser.add_argument("--number", default=4, type=int, help="of images, at most (%(default)s)")
    parser.add_argument("--size-px", default=224, type=int, help="side of images (%(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="of random weights (%(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="folder")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plot_states(
        args.model,
        args.weights,
        args.input,
        args.output,
        stage=args.stage,
        block=args.block,
        channels=args.channels,
        number=args.number,
        size_px=args.size_px,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
