#!/usr/bin/env python3
"""Serve predictions over HTTP: POST an image, get JSON.

    python tools/serve.py --weights model_final.pth --port 8000
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/predict?masks=polygons'
    curl --form image=@photo.jpg 'http://127.0.0.1:8000/predict?score_thresh=0.7'

The weights are a checkpoint of any task, or a file of tools/export_model.py. /openapi.json
describes the answers; /healthz and /metrics are for monitoring. SIGTERM or Ctrl-C: no more requests
are accepted, and those that wait are answered. There is no access control: others reach it through
a proxy that has one.
"""

import argparse

from spatial_mamba_d2.system.allocator import keep_freed_memory
from spatial_mamba_d2.system.cli import build_key_value_parser, log_to_stdout, run_tool


def main() -> None:
    from spatial_mamba_d2.prediction.loading import add_model_arguments

    keep_freed_memory()
    parser = build_key_value_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument(
        "--max-bytes", type=int, default=20_000_000, help="of a request (%(default)s)"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=50_000_000, help="of an image (%(default)s)"
    )
    parser.add_argument(
        "--max-windows", type=int, default=256, help="by which it is predicted (%(default)s)"
    )
    parser.add_argument(
        "--max-pending",
        type=int,
        default=16,
        help="requests at a time; others get 503 (%(default)s)",
    )
    parser.add_argument(
        "--timeout-s", type=float, default=60.0, help="of a request, in seconds (%(default)s)"
    )
    parser.add_argument("--access-log", action="store_true", help="print a line for each request")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    log_to_stdout()
    from spatial_mamba_d2.serving.server import run

    run(args)


if __name__ == "__main__":
    run_tool(main)
