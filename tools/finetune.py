#!/usr/bin/env python3
"""Train on a folder of labelled images: settings are chosen, written to a file, and run.

    python tools/finetune.py --data my/data --weights spatialmamba_tiny.pth
    python tools/finetune.py --data my/data --weights spatialmamba_tiny.pth --minutes 60 \
        --output output/mine

Format, task, classes and a split are recognised or made (tools/check_data.py checks them). The
weights are a backbone or a complete model, ours or the authors'; without any, training starts from
random ones. OUTPUT/finetune.yaml is what the ordinary tools take, with the reason for each setting.

    python tools/finetune.py --output output/mine --resume
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_key_value_parser, log_to_stdout, run_tool


def main() -> None:
    from spatial_mamba_d2.data.formats import TASKS
    from spatial_mamba_d2.finetuning import finetune

    keep_freed_memory()
    parser = build_key_value_parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="PATH", help="a folder, or COCO's JSON")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="default: random weights")
    parser.add_argument("--output", type=Path, default=Path("output/finetune"), metavar="FOLDER")
    parser.add_argument("--task", choices=TASKS, help="default: that of the recognised format")
    parser.add_argument("--size", choices=("t", "s", "b"), help="default: that of the weights")
    parser.add_argument("--epochs", type=float, metavar="N", help="default: by the task")
    parser.add_argument("--minutes", type=float, metavar="M", help="instead of --epochs")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N")
    parser.add_argument("--resume", action="store_true", help="continue the training in --output")
    parser.add_argument(
        "--rehearse", action="store_true", help="train only if tools/rehearse.py passes"
    )
    parser.add_argument("--only-write", action="store_true", help="write the file and do not train")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    if args.data is None and not args.resume:
        parser.error("--data is required, unless with --resume")
    log_to_stdout()
    finetune(
        args.data, args.weights, args.output, task=args.task, size=args.size, epochs=args.epochs,
        minutes=args.minutes, overrides=tuple(args.opts), num_gpus=args.num_gpus,
        resume=args.resume, only_write=args.only_write, rehearse_first=args.rehearse,
    )  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
