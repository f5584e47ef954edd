#!/usr/bin/env python3
"""Train the classifier on ImageNet, or on any images in class folders, or evaluate it.

    python tools/train_cls.py --config-file configs/spatial_mamba_t.yaml --num-gpus 8
    python tools/train_cls.py --config-file configs/spatial_mamba_t.yaml --eval-only \
        MODEL.WEIGHTS spatialmamba_tiny.pth

runs on the GPU where there is one, else on the CPU. Other data, from the shell:

    ... DATASETS.ROOT my/data DATASETS.CLASSES "" MODEL.NUM_CLASSES 5
"""

from spatial_mamba_d2.classification.train import test, train
from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.training.fit import build_parser


def main() -> None:
    keep_freed_memory()
    parser = build_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT_DIR/last.ckpt")
    parser.add_argument(
        "--eval-only", action="store_true", help="MODEL.WEIGHTS, or OUTPUT_DIR/best.ckpt"
    )
    args = parser.parse_args()
    if args.eval_only:
        test(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
