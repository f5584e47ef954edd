#!/usr/bin/env python3
"""Classify images and write the most probable classes on them.

    python tools/visualize_cls.py --config-file configs/spatial_mamba_t.yaml \
        --input photo.jpg folder/ --output drawings/ MODEL.WEIGHTS spatialmamba_tiny.pth
"""

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_visualization_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.classification.predict import build_draw
    from spatial_mamba_d2.data.images import visualize_by_arguments

    keep_freed_memory()
    visualize_by_arguments(build_visualization_parser(__doc__).parse_args(), build_draw)


if __name__ == "__main__":
    run_tool(main)
