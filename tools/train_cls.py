#!/usr/bin/env python3
"""Train the classifier on ImageNet, or on any images in class folders, or evaluate it.

    python tools/train_cls.py --config-file configs/spatial_mamba_t.yaml --num-gpus 8
    python tools/train_cls.py --config-file configs/spatial_mamba_t.yaml --eval-only \
        MODEL.WEIGHTS spatialmamba_tiny.pth

runs on the GPU if there is one, else on the CPU. Other data, from the shell:

    ... DATASETS.ROOT my/data DATASETS.CLASSES "" MODEL.NUM_CLASSES 5
"""

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_training_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.classification.train import run

    keep_freed_memory()
    args = build_training_parser(__doc__).parse_args()
    if args.rehearse:
        from spatial_mamba_d2.finetuning.rehearsal import rehearse_first

        rehearse_first("classification", args)
    run(args)


if __name__ == "__main__":
    run_tool(main)
