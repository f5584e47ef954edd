"""A stub predictor that is fast, and files to send."""

from __future__ import annotations

import io
import runpy
import socket
import struct
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from spatial_mamba_d2.prediction import Predictor
from tests.prediction.conftest import (
    Oracle,
    checkpoint,  # noqa: F401  a fixture
    config_of,  # noqa: F401  a fixture
    make_scene,
)


@pytest.fixture(scope="session")
def truth():
    """48 x 64 with a few objects, whose colours :class:`Oracle` reads."""
    return make_scene((48, 64), 4, 0, seed=3)


@pytest.fixture(scope="session")
def file_of() -> Callable[..., bytes]:
    """``file_of(pixels, format)``: the content of an image file."""

    def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, kind)
            return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def huge_png() -> Callable[[int, int], bytes]:
    """``huge_png(height, width)``: a small file whose header promises that many pixels.

    What stands behind its pixels makes Pillow decode them in order to get at the orientation.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    def encode(height: int, width: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        packer = zlib.compressobj(9)
        row = bytes(1 + 3 * width)
        pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
        parts = [(b"IHDR", header), (b"IDAT", pixels), (b"tEXt", b"Comment\0x"), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)

    return encode


@pytest.fixture
def predictor() -> Callable[..., Predictor]:
    """``predictor(task)``: one that reads the truth of ``truth``."""
    return lambda task="detection", **options: Predictor(Oracle(task, **options))


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_tool(tool: Path, *words: object) -> None:
    """Run a file of ``tools/`` in this process."""
    sys.argv = [str(tool), *map(str, words)]
    runpy.run_path(str(tool), run_name="__main__")


def wait_for(url: str) -> None:
    """Returns when it answers."""
    for _ in range(1200):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(url)


def as_label(truth: Any) -> np.ndarray:
    return (truth.numbers % 3).astype(np.uint8)
