#!/usr/bin/env python3
"""Draw what a detector finds in images.

    python tools/visualize.py --config-file configs/mask_rcnn_spatial_mamba_t.yaml \
        --input photo.jpg folder/ --output drawings/ MODEL.WEIGHTS model_final.pth

``TEST.PICTURES_SCORE_THRESH`` is the lowest score that is drawn.
"""

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_visualization_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.data.images import visualize_by_arguments
    from spatial_mamba_d2.detection.predict import build_draw

    keep_freed_memory()
    visualize_by_arguments(build_visualization_parser(__doc__).parse_args(), build_draw)


if __name__ == "__main__":
    run_tool(main)
