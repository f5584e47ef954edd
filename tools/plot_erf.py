#!/usr/bin/env python3
"""Effective receptive field of each stage of backbones, ours and timm's, side by side.

    python tools/plot_erf.py --model spatial_mamba_tiny swin_tiny_patch4_window7_224 \
        --weights spatialmamba_tiny.pth swin.pth --input photos/ --output output/erf

Without --weights the weights are random, without --input the images are generated.
"""

import logging
from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.explain.cli import add_image_arguments
    from spatial_mamba_d2.explain.receptive_field import plot_receptive_fields

    parser = build_parser(__doc__)
    parser.add_argument(
        "--model", dest="models", nargs="+", default=["spatial_mamba_tiny"], metavar="NAME"
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        type=lambda file: None if file == "-" else Path(file),
        metavar="FILE",
        help="one for each model, - for random weights",
    )
    add_image_arguments(parser, num_images=16)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plot_receptive_fields(**vars(args))


if __name__ == "__main__":
    run_tool(main)
