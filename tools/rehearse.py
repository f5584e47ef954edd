#!/usr/bin/env python3
"""Rehearse a training in about a minute: four of its images, with its own configuration.

    python tools/rehearse.py --config-file output/mine/finetune.yaml
    python tools/rehearse.py --config-file configs/mask_rcnn_spatial_mamba_t.yaml KEY VALUE ...

It reads, trains, evaluates, saves, resumes and predicts, says what the real training takes, and
names the reason when it does not learn. Exit code: 0 it learns, 1 it does not, 2 it cannot start.
"""

import argparse

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_key_value_parser, log_to_stdout, run_tool


def main() -> int:
    from spatial_mamba_d2.data.formats import TASKS
    from spatial_mamba_d2.finetuning.rehearsal import rehearse

    keep_freed_memory()
    parser = build_key_value_parser(__doc__)
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--task", choices=TASKS, help="default: the one that has all keys")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    log_to_stdout()
    result = rehearse(args.config_file or None, args.opts, args.task)
    print(result.text())
    return int(bool(result.reasons))


if __name__ == "__main__":
    run_tool(main)
