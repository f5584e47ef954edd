#!/usr/bin/env python3
"""Everything that waits for a GPU, correctness first, in one report; continues what was cut off.

python tools/gpu_first_hour.py --output output/first_hour
python tools/gpu_first_hour.py --device cpu --variant tiny --size 64 96 --rounds 1 --steps machine
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main() -> int:
    from spatial_mamba_d2.models.variants import VARIANTS
    from spatial_mamba_d2.profiling.first_hour import run_hour, write_step
    from spatial_mamba_d2.profiling.first_hour_steps import STEPS, Settings

    defaults = Settings()
    parser = build_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/first_hour"))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=defaults.device)
    parser.add_argument(
        "--size", type=int, nargs=2, default=defaults[1:3], metavar=("H", "W"), help="of images"
    )
    parser.add_argument("--training-px", type=int, default=defaults.training_px)
    parser.add_argument("--batch", type=int, default=defaults.batch, help="of training")
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--variant", choices=VARIANTS, default=defaults.variant)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    height, width = options.size
    settings = Settings(
        options.device,
        height,
        width,
        options.training_px,
        options.batch,
        options.rounds,
        options.variant,
    )
    if options.step:
        write_step(options.step, settings, options.output)
        return 0
    return min(run_hour(options.output, settings, options.steps, Path(__file__)), 1)


if __name__ == "__main__":
    run_tool(main)
