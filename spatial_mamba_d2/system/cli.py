"""Arguments that several command lines share, and what they print."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from urllib.parse import urlsplit


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that keeps the lines of ``description``."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def build_training_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of Detectron2's ``train_net.py``, for the tools of all tasks."""
    parser = build_parser(description)
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="continue the training in OUTPUT_DIR")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (or what OUTPUT_DIR has)"
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="per machine; without a GPU: processes"
    )
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    return parser


def build_visualization_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of tools that draw predictions for images."""
    parser = build_parser(description)
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument("--input", required=True, nargs="+", type=Path, help="images and folders")
    parser.add_argument("--output", required=True, type=Path, help="folder for the drawings")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace drawings in --output; never an input"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    return parser


def parse_address(url: str) -> tuple[str, int]:
    """Host and port of ``--dist-url``.

    Raises:
        ValueError: it is not ``tcp://HOST:PORT``.
    """
    parts = urlsplit(url)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise ValueError(f"--dist-url must be tcp://HOST:PORT for several machines, got {url!r}")
    return parts.hostname, parts.port


def log_to_stdout(level: int = logging.INFO) -> None:
    """Print the package's messages from ``level`` on."""
    package = logging.getLogger("spatial_mamba_d2")
    package.setLevel(level)
    if not package.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
        package.addHandler(handler)
