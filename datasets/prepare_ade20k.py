#!/usr/bin/env python3
"""Unpack ADE20K's archive, if given, and check every image and label file of both splits.

    python datasets/prepare_ade20k.py --zip ADEChallengeData2016.zip
    python datasets/prepare_ade20k.py --root /data/ADEChallengeData2016

The archive is from http://sceneparsing.csail.mit.edu. To check other data with the same layout:

    python datasets/prepare_ade20k.py --root my/data --num-classes 5 --label-offset 0 --ignore 255

It also says in how many pixels and images each class occurs. The options have the meaning of the
keys of DATASETS with these names (train_seg.py); the first split is the one to train on.
"""

from __future__ import annotations

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main(argv: list[str] | None = None) -> None:
    from spatial_mamba_d2.data.ade20k import (
        check_split,
        check_training_counts,
        load_classes,
        unpack,
    )
    from spatial_mamba_d2.data.label_format import build_label_format
    from spatial_mamba_d2.data.pair_files import Layout
    from spatial_mamba_d2.data.pixels import build_pixel_range

    parser = build_parser(__doc__)
    default = Path("datasets/ADEChallengeData2016")
    parser.add_argument("--zip", type=Path, help="unpack this into --root, unless that exists")
    parser.add_argument("--root", type=Path, default=default)
    parser.add_argument("--splits", nargs="+", default=("training", "validation"))
    parser.add_argument("--num-classes", type=int, default=150, metavar="N")
    parser.add_argument("--label-offset", type=int, default=1, metavar="N")
    parser.add_argument("--ignore", type=int, nargs="*", default=(0,), metavar="N")
    parser.add_argument("--label-map", default="", metavar="ENTRIES", help="or a file with them")
    parser.add_argument("--classes", default="", metavar="FILE", help="names, in --root")
    parser.add_argument("--image-folder", default=Layout.image_folder, metavar="FOLDER")
    parser.add_argument("--label-folder", default=Layout.label_folder, metavar="FOLDER")
    parser.add_argument("--image-suffix", default="", metavar="ENDING")
    parser.add_argument("--label-suffix", default="", metavar="ENDING")
    parser.add_argument("--channels", type=int, default=3, metavar="N", help="INPUT.CHANNELS")
    parser.add_argument(
        "--pixel-range", type=float, nargs=2, default=(), metavar="X", help="INPUT.PIXEL_RANGE"
    )
    options = parser.parse_args(argv)
    if options.zip:
        unpack(options.zip, options.root)
    names = load_classes(options.classes, options.root, options.num_classes).names
    labels = build_label_format(
        names, options.label_offset, options.ignore, options.label_map, options.root
    )
    layout = Layout(
        options.image_folder, options.label_folder, options.image_suffix, options.label_suffix
    )
    for split in options.splits:
        checked = check_split(
            options.root,
            split,
            labels,
            layout=layout,
            num_channels=options.channels,
            value_range=build_pixel_range(options.pixel_range),
            check_decode=True,
            root_name="--root",
        )
        where = f"{options.root} {split}"
        print(f"{where}: {len(checked.pairs)} images with valid labels")
        print(checked.counts.table(names))
        if split == options.splits[0]:
            check_training_counts(checked.counts, names, labels, where)


if __name__ == "__main__":
    run_tool(main)
