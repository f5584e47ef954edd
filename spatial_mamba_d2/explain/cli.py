"""The command-line arguments that the tools of this subpackage share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_image_arguments(parser: argparse.ArgumentParser, *, num_images: int) -> None:
    """Add ``--input``, ``--number``, ``--size-px``, ``--seed``, ``--output`` and ``--overwrite``.

    They are parsed as ``inputs``, ``num_images``, ``size_px``, ``seed``, ``output``, ``overwrite``.

    Args:
        num_images: default of ``--number``.
    """
    parser.add_argument(
        "--input", dest="inputs", nargs="+", default=[], type=Path, help="images and folders"
    )
    parser.add_argument(
        "--number",
        dest="num_images",
        metavar="NUMBER",
        default=num_images,
        type=int,
        help="most images to use (%(default)s)",
    )
    parser.add_argument("--size-px", default=224, type=int, help="side of images (%(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="seed of random weights (%(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace results in --output; never an input"
    )
