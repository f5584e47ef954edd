#!/usr/bin/env python3
"""Evaluate a segmentor, with the authors' single-scale protocol unless told otherwise.

    python tools/test_seg.py --config-file configs/upernet_spatial_mamba_t.yaml \
        MODEL.WEIGHTS upernet_tiny.pth

Several scales and mirror images, or a sliding window:

    ... TEST.PROTOCOL ms
    ... TEST.MODE slide TEST.CROP_PX 512 TEST.STRIDE_PX 341
"""

from spatial_mamba_d2.segmentation.train import test
from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.training.fit import build_parser


def main() -> None:
    keep_freed_memory()
    test(build_parser(__doc__).parse_args())


if __name__ == "__main__":
    main()
