#!/usr/bin/env python3
"""Train UPerNet on ADE20K, or on any data in its folder layout, or evaluate it.

    python tools/train_seg.py --config-file configs/upernet_spatial_mamba_t.yaml --num-gpus 8 \
        MODEL.WEIGHTS spatialmamba_tiny.pth
    python tools/train_seg.py --config-file configs/upernet_spatial_mamba_t.yaml --eval-only \
        MODEL.WEIGHTS upernet_tiny.pth

runs on the GPU if there is one, else on the CPU. Other data, from the shell:

    ... DATASETS.ROOT my/data DATASETS.CLASSES names.txt MODEL.NUM_CLASSES 5 \
        DATASETS.LABEL_OFFSET 0 DATASETS.IGNORE_LABELS "(255,)"

Evaluation follows the authors' single-scale protocol by default. Several scales with flip, or a
sliding window:

    ... TEST.PROTOCOL ms
    ... TEST.MODE slide TEST.CROP_PX 512 TEST.STRIDE_PX 341

Predicted label maps as files, in the values that the data set's label files store:

    ... TEST.SAVE_LABELS output/labels
"""

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_training_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.segmentation.train import run

    keep_freed_memory()
    args = build_training_parser(__doc__).parse_args()
    if args.rehearse:
        from spatial_mamba_d2.finetuning.rehearsal import rehearse_first

        rehearse_first("segmentation", args)
    run(args)


if __name__ == "__main__":
    run_tool(main)
