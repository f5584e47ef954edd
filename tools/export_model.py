#!/usr/bin/env python3
"""Write a model as a file for other runtimes, and compare its answers with PyTorch's.

    python tools/export_model.py --weights spatialmamba_tiny.pth --format onnx \
        --output classifier.onnx

The task follows from the weights. A file is for images of all sizes, or with --size for those of
one. Without --config-file, the configuration is the one in the checkpoint, or recognised.
docs/export.md describes the files; tools/predict.py and examples/onnx_runner.py run them.
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.system.cli import build_key_value_parser, log_to_stdout, run_tool


def main() -> None:
    from spatial_mamba_d2 import deploy
    from spatial_mamba_d2.export.formats import FORMATS
    from spatial_mamba_d2.export.precision import PRECISIONS

    parser = build_key_value_parser(__doc__)
    parser.add_argument("--weights", required=True, type=Path, metavar="FILE")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--dynamic", action="store_true", help="for images of all sizes (default)")
    sizes.add_argument("--size", type=int, nargs=2, metavar=("H", "W"))
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument(
        "--result", choices=("labels", "probabilities"), help="of UPerNet (default: labels)"
    )
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], help="to compare on; default: generated ones"
    )
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    log_to_stdout()
    deploy.export_model(
        args.weights,
        args.format,
        args.output,
        config_file=args.config_file,
        overrides=args.opts,
        size=args.size,
        precision=args.precision,
        result=args.result,
        images=args.images,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    run_tool(main)
