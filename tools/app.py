#!/usr/bin/env python3
"""Predictions in the browser: an image in, drawings and files out.

    python tools/app.py
    python tools/app.py --weights detector.pth segmentor.ckpt --port 7860

Without --weights, the models of `python3 dev.py demo`, `demo-seg` and `demo-cls` are shown, as far
as they have been trained. Weights are checkpoints, or files of tools/export_model.py, at most one
of each task. Nothing is loaded from other hosts.
"""

from pathlib import Path

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_parser, log_to_stdout, run_tool


def main() -> None:
    keep_freed_memory()
    parser = build_parser(__doc__)
    parser.add_argument("--weights", nargs="+", default=[], type=Path, metavar="FILE")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    args = parser.parse_args()
    log_to_stdout()
    from spatial_mamba_d2.serving.demo_page import run

    run(args)


if __name__ == "__main__":
    run_tool(main)
