#!/usr/bin/env python3
"""Unpack ADE20K's archive, if given, and check every image and label file of both splits.

    python datasets/prepare_ade20k.py --zip ADEChallengeData2016.zip
    python datasets/prepare_ade20k.py --root /data/ADEChallengeData2016

The archive is from http://sceneparsing.csail.mit.edu. To check other data with the same layout:

    python datasets/prepare_ade20k.py --root my/data --num-classes 5 --label-offset 0 --ignore 255
"""

from __future__ import annotations

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main(argv: list[str] | None = None) -> None:
    from spatial_mamba_d2.data.ade20k import load_split, unpack
    from spatial_mamba_d2.data.label_maps import LabelFormat

    parser = build_parser(__doc__)
    default = Path(__file__).resolve().parent / "ADEChallengeData2016"
    parser.add_argument("--zip", type=Path, help="unpack this into --root, unless that exists")
    parser.add_argument("--root", type=Path, default=default)
    parser.add_argument("--splits", nargs="+", default=("training", "validation"))
    parser.add_argument("--num-classes", type=int, default=150, metavar="N")
    parser.add_argument("--label-offset", type=int, default=1, metavar="N")
    parser.add_argument("--ignore", type=int, nargs="*", default=(0,), metavar="N")
    options = parser.parse_args(argv)
    if options.zip:
        unpack(options.zip, options.root)
    labels = LabelFormat(options.num_classes, options.label_offset, tuple(options.ignore))
    for split in options.splits:
        pairs = load_split(options.root, split, labels, check_decode=True)
        print(f"{options.root} {split}: {len(pairs)} images with valid labels")


if __name__ == "__main__":
    run_tool(main)
