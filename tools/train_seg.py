#!/usr/bin/env python3
"""Train UPerNet on ADE20K, or on any data in its folder shape.

    python tools/train_seg.py --config-file configs/upernet_spatial_mamba_t.yaml --num-gpus 8 \
        MODEL.WEIGHTS spatialmamba_tiny.pth

runs on the GPU where there is one, else on the CPU. Other data, from the shell:

    ... DATASETS.ROOT my/data DATASETS.CLASSES names.txt MODEL.NUM_CLASSES 5 \
        DATASETS.LABEL_OFFSET 0 DATASETS.IGNORE_LABELS "(255,)"
"""

from spatial_mamba_d2.segmentation.train import train
from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.training.fit import build_parser


def main() -> None:
    keep_freed_memory()
    parser = build_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT_DIR/last.ckpt")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
