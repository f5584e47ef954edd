#!/usr/bin/env python3
"""Time our operators, backbone and detector beside others', on this machine's CPU or GPU.

python tools/benchmark.py --task backbone --size 640 896 --threads 1 2
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.profiling.benchmark import DEVICES, TASKS, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="backbone")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 896), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[None], help="a run for each")
    parser.add_argument("--compile", action="store_true", help="backbones by torch.compile too")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    parser.add_argument("--keep-freed-memory", action=argparse.BooleanOptionalAction, default=True,
                        help="for the next tensors, as our tools do")  # fmt: skip
    args = parser.parse_args()
    for threads in args.threads:
        main(args.task, *args.size, args.batch, args.rounds, threads, args.output, args.device,
             args.compile, args.keep_freed_memory)  # fmt: skip
