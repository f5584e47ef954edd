#!/usr/bin/env python3
"""Draw what a detector finds in images.

    python tools/visualize.py --config-file configs/mask_rcnn_spatial_mamba_t.yaml \
        --input photo.jpg folder/ --output drawings/ MODEL.WEIGHTS model_final.pth

``TEST.PICTURES_SCORE_THRESH`` is the lowest score that is drawn.
"""

from functools import partial

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_visualization_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.data.images import visualize_images
    from spatial_mamba_d2.detection.predict import build_draw

    keep_freed_memory()
    args = build_visualization_parser(__doc__).parse_args()
    visualize_images(
        args.input,
        args.output,
        partial(build_draw, args.config_file, args.opts),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    run_tool(main)
