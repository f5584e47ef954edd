#!/usr/bin/env python3
"""Segment images and draw the result; they need no labels.

    python tools/visualize_seg.py --config-file configs/upernet_spatial_mamba_t.yaml \
        --input photo.jpg folder/ --output drawings/ MODEL.WEIGHTS upernet_tiny.pth

Label maps in the values that the data set's label files store, for a submission server:

    ... TEST.SAVE_LABELS labels/
"""

from functools import partial

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_visualization_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.data.images import visualize_images
    from spatial_mamba_d2.segmentation.predict import build_draw, label_folder

    keep_freed_memory()
    args = build_visualization_parser(__doc__).parse_args()
    visualize_images(
        args.input,
        args.output,
        partial(build_draw, args.config_file, args.opts, args.output),
        overwrite=args.overwrite,
        label_folder=label_folder(args.config_file, args.opts),
    )


if __name__ == "__main__":
    run_tool(main)
