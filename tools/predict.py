#!/usr/bin/env python3
"""Predict for images, and write files that other programs read.

    python tools/predict.py --weights model_final.pth --input photos/ --output predictions/ \
        --format coco,csv

Task and configuration are recognised from the checkpoint. Images are files, videos, tar files,
folders, patterns such as 'photos/**/*.jpg', and lists of these in .txt files. Large images, by
windows:

    ... --input scene.tif --window 1024 --overlap 256 --format geojson

A stream or a camera, until it ends, a bound is reached, or Ctrl-C, after which the results are
complete:

    ... --input rtsp://camera/stream --seconds 60        --input /dev/video0 --max-frames 500

A run that was stopped continues with --resume. Several processes, on one file system:

    ... --shard 1/2 & ... --shard 2/2 & wait; ... --merge

The same by --processes 2, by torchrun --nproc-per-node 2 tools/predict.py ..., by a SLURM array,
for which --slurm 100 prints the script, or by --ray 100 as tasks of Ray.
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_key_value_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.prediction.command import run
    from spatial_mamba_d2.prediction.loading import add_model_arguments
    from spatial_mamba_d2.prediction.predictor import SCORE_THRESH
    from spatial_mamba_d2.prediction.writers import FORMATS

    keep_freed_memory()
    parser = build_key_value_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="images, videos, tar files, folders, patterns, lists; or one stream or camera",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--format", required=True, nargs="+", metavar="NAME", help=f"among {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--score-thresh", type=float, default=SCORE_THRESH, help="of detections (%(default)s)"
    )
    parser.add_argument("--window", type=int, metavar="PX", help="side of windows")
    parser.add_argument("--overlap", type=int, metavar="PX", help="default: a quarter of --window")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N",
        help="images or windows of one size that are predicted together (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-frames", type=int, metavar="N", help="of a stream or camera that are predicted"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of a stream or camera, from its first frame on"
    )
    parser.add_argument("--resume", action="store_true", help="continue what was stopped")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results in --output; never an input"
    )
    parser.add_argument("--shard", metavar="I/N", help="only the I-th of N shares of the work")
    parser.add_argument("--merge", action="store_true", help="write what all shards have found")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="of this machine (%(default)s)"
    )
    parser.add_argument(
        "--slurm", type=int, metavar="N", help="print a SLURM script of N jobs, and do nothing else"
    )
    parser.add_argument(
        "--ray", type=int, metavar="N", help="predict N shards as tasks of Ray, and merge them"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    run(parser.parse_args())


if __name__ == "__main__":
    run_tool(main)
