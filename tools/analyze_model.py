#!/usr/bin/env python3
"""Parameters, FLOPs and activation memory of the models in configs/, as Markdown.

    python tools/analyze_model.py                              # those that were published
    python tools/analyze_model.py upernet_spatial_mamba_t --json upernet.json

Detectors need Detectron2; without it, name the other models.
"""

from pathlib import Path

from spatial_mamba_d2.system.cli import build_parser, run_tool


def main() -> None:
    from spatial_mamba_d2.model_zoo import COUNTED, list_models
    from spatial_mamba_d2.profiling.model_report import report

    parser = build_parser(__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=", ".join([*list_models(), *COUNTED])
    )
    parser.add_argument(
        "--input-px", nargs=2, type=int, metavar=("H", "W"), help="default: as published"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    args = parser.parse_args()
    size = tuple(args.input_px) if args.input_px else None
    report(args.names or list_models(), size, args.json)


if __name__ == "__main__":
    run_tool(main)
