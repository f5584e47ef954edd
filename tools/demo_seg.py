#!/usr/bin/env python3
"""Segment images and draw the result; they need no labels.

    python tools/demo_seg.py --config-file configs/upernet_spatial_mamba_t.yaml \
        --input photo.jpg folder/ --output pictures/ MODEL.WEIGHTS upernet_tiny.pth
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.segmentation.predict import segment_folder
from spatial_mamba_d2.system.allocator import keep_freed_memory


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE")
    parser.add_argument("--input", required=True, nargs="+", type=Path, help="images and folders")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    segment_folder(args.config_file, args.opts, args.input, args.output)


if __name__ == "__main__":
    main()
