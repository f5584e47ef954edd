#!/usr/bin/env python3
"""Turn COCO's panoptic annotations into the label maps that Panoptic FPN trains on.

    python datasets/prepare_panoptic.py --json datasets/coco/annotations/panoptic_val2017.json \
        --images datasets/coco/panoptic_val2017 --output datasets/coco/panoptic_stuff_val2017

In a label map, things are 0, stuff 1, 2, ..., and pixels without a category 255.
"""

from __future__ import annotations

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main(argv: list[str] | None = None) -> None:
    from spatial_mamba_d2.data.panoptic import write_stuff_labels

    parser = build_parser(__doc__)
    parser.add_argument("--json", type=Path, required=True, help="in COCO's panoptic format")
    parser.add_argument("--images", type=Path, required=True, help="folder of its PNG files")
    parser.add_argument("--output", type=Path, required=True, help="folder of the label maps")
    options = parser.parse_args(argv)
    number = write_stuff_labels(options.json, options.images, options.output)
    print(f"{options.output}: {number} label maps")


if __name__ == "__main__":
    run_tool(main)
