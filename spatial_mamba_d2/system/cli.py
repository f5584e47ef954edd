"""What command lines share: how they end, their arguments, and what they print."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from spatial_mamba_d2.system.tool_errors import find_mistake


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's ``main()`` and exit with its result, or with what stopped it.

    A tool imports in ``main`` what needs more than this package, so that missing packages are told
    like other mistakes.

    A user's mistake ends with ``error: ...`` on standard error and exit code 2, a training that
    diverged with the same and 1; any other exception keeps its traceback, with 1. With
    ``SMD2_DEBUG=1`` every exception shows its traceback; the exit codes are the same.
    """
    # timm's and Detectron2's, on every import
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        mistake = find_mistake(error)
        if mistake is None:
            raise
        sys.stdout.flush()
        show_traceback_in_debugging()
        print(f"error: {mistake.text}", file=sys.stderr)
        sys.exit(mistake.exit_code)


def show_traceback_in_debugging() -> None:
    """Print the traceback of the exception that is handled, with ``SMD2_DEBUG=1``."""
    if os.environ.get("SMD2_DEBUG") == "1":
        traceback.print_exc()


class _KeyValueParser(argparse.ArgumentParser):
    """A parser whose last argument, ``opts``, takes all remaining words: ``KEY VALUE ...``.

    Options are recognised before these only, and an option that takes several words would swallow
    them: the keys among its words are moved to ``opts``, and an option among the keys is an error.
    """

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options = super().parse_args(args, namespace)
        for name, value in vars(options).items():
            if name != "opts" and isinstance(value, list) and value:
                first = next((i for i, word in enumerate(value) if _is_key(word)), len(value))
                options.opts = [*map(str, value[first:]), *options.opts]
                del value[first:]
                if not value:
                    self.error(f"argument --{name}: expected words before KEY VALUE")
        for index, word in enumerate(options.opts):
            if word.startswith("--" if index % 2 else "-"):
                self.error(f"options go before KEY VALUE, got {word} after {options.opts[0]}")
        return options


def _is_key(word: str | Path) -> bool:
    """Whether a word on the command line is a configuration key such as ``MODEL.WEIGHTS``."""
    key = re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)+|OUTPUT_DIR|SEED", str(word))
    return bool(key) and not Path(word).exists()


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that keeps the lines of ``description``."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def build_key_value_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser for options and then ``opts``, which the caller adds with ``REMAINDER``."""
    return _KeyValueParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Options go before KEY VALUE.",
    )


def build_training_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of Detectron2's ``train_net.py``, for the tools of all tasks."""
    parser = build_key_value_parser(description)
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
    parser.add_argument(
        "--rehearse", action="store_true", help="train only if tools/rehearse.py passes"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    return parser


def build_visualization_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of tools that draw predictions for images."""
    parser = build_key_value_parser(description)
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
