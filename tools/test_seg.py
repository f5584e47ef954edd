#!/usr/bin/env python3
"""Old name of ``train_seg.py --eval-only``; it will be removed in the next version."""

import sys

from train_seg import main

from spatial_mamba_d2.system.cli import run_tool

if __name__ == "__main__":
    print("test_seg.py is deprecated: use train_seg.py --eval-only", file=sys.stderr)
    sys.argv.insert(1, "--eval-only")
    run_tool(main)
