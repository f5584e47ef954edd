#!/usr/bin/env python3
"""Old name of ``visualize_seg.py``; it will be removed in the next version."""

import sys

from visualize_seg import main

from spatial_mamba_d2.system.cli import run_tool

if __name__ == "__main__":
    print("demo_seg.py is deprecated: use visualize_seg.py", file=sys.stderr)
    run_tool(main)
