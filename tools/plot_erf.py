#!/usr/bin/env python3
"""Effective receptive field of each stage of backbones, ours and timm's, side by side.

    python tools/plot_erf.py --model spatial_mamba_tiny swin_tiny_patch4_window7_224 \
        --weights spatialmamba_tiny.pth swin.pth --input photos/ --output output/erf

Without --weights they are random, without --input the pictures are generated.
"""

import argparse
import logging
from pathlib import Path

from spatial_mamba_d2.explain.receptive_field import plot_receptive_fields


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["spatial_mamba_tiny"], metavar="NAME")
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="FILE", help="one for each model, - for random"
    )
    parser.add_argument("--input", nargs="+", default=[], type=Path, help="images and folders")
    parser.add_argument("--number", default=16, type=int, help="of images, at most (%(default)s)")
    parser.add_argument("--size-px", default=224, type=int, help="side of images (%(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="of random weights (%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", required=True, type=Path, help="folder")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plot_receptive_fields(
        args.model,
        [None if file == "-" else Path(file) for file in args.weights],
        args.input,
        args.output,
        number=args.number,
        size_px=args.size_px,
        seed=args.seed,
        device=args.device,
    )


if __name__ == "__main__":
    main()
