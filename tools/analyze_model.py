#!/usr/bin/env python3
"""Parameters, FLOPs and activation memory of the published models, as Markdown.

    python tools/analyze_model.py                              # all of them
    python tools/analyze_model.py upernet_spatial_mamba_t --json upernet.json

Without Detectron2 the detectors cannot be built; name the others then.
"""

import argparse
from pathlib import Path

from spatial_mamba_d2.model_zoo import list_models
from spatial_mamba_d2.profiling.model_size import analyze, markdown_report, write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(list_models()))
    parser.add_argument(
        "--input-px", nargs=2, type=int, metavar=("H", "W"), help="default: as published"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    size = tuple(args.input_px) if args.input_px else None
    analyses = [analyze(name, size) for name in args.names or list_models()]
    if args.json:
        write_json(analyses, args.json)
    print(markdown_report(analyses))


if __name__ == "__main__":
    main()
