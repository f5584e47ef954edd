#!/usr/bin/env python3
"""Train or evaluate a detector: Detectron2's train_net.py for Spatial-Mamba.

    python tools/train_net.py --config-file configs/mask_rcnn_spatial_mamba_t.yaml \
        MODEL.WEIGHTS spatialmamba_tiny.pth

runs on the GPU if there is one, else on the CPU. Any data set in COCO format, from the shell:

    ... DATASETS.TRAIN_JSON train.json DATASETS.TRAIN_IMAGES train/ \
        DATASETS.TEST_JSON val.json DATASETS.TEST_IMAGES val/ MODEL.ROI_HEADS.NUM_CLASSES 5
"""

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_training_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.detection.launch import launch
    from spatial_mamba_d2.detection.train import run

    keep_freed_memory()
    args = build_training_parser(__doc__).parse_args()
    if args.rehearse:
        from spatial_mamba_d2.finetuning.rehearsal import rehearse_first

        rehearse_first("detection", args)
    launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))


if __name__ == "__main__":
    run_tool(main)
