#!/usr/bin/env python3
"""Draw what a detector finds in images.

    python tools/visualize.py --config-file configs/mask_rcnn_spatial_mamba_t.yaml \
        --input photo.jpg folder/ --output pictures/ MODEL.WEIGHTS model_final.pth
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.detection.predict import draw_folder
from spatial_mamba_d2.system.allocator import keep_freed_memory


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--input", required=True, nargs="+", type=Path, help="images and folders")
    parser.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    draw_folder(args.config_file, args.opts, args.input, args.output)


if __name__ == "__main__":
    main()
