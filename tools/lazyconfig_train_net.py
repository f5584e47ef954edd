#!/usr/bin/env python3
"""Train or evaluate a detector by a Python configuration, as Detectron2's tool of this name.

    python tools/lazyconfig_train_net.py --config-file configs/lazy/mask_rcnn_spatial_mamba_t.py \
        train.init_checkpoint=spatialmamba_tiny.pth

The same recipes as in YAML. Any part can be replaced: key=value, and +key=value for arguments that
the file does not have. Data sets of your own:

    ... dataloader.data.train_json=train.json dataloader.data.train_images=train/ \
        dataloader.data.test_json=val.json dataloader.data.test_images=val/ \
        model.roi_heads.num_classes=5
"""

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_training_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.detection.launch import launch
    from spatial_mamba_d2.detection.lazy import run

    keep_freed_memory()
    args = build_training_parser(__doc__).parse_args()
    launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))


if __name__ == "__main__":
    run_tool(main)
