"""What an iteration takes here: a few of them are run, in a process and folder of their own."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from spatial_mamba_d2.system.package_files import top_level_folder

logger = logging.getLogger(__name__)

TOOLS = {
    "detection": "train_net.py",
    "segmentation": "train_seg.py",
    "classification": "train_cls.py",
}
_ITERATIONS = 6
_OUT_OF_MEMORY = re.compile(r"out of memory|MemoryError|Cannot allocate memory|DefaultCPUAllocator")


class Probe(NamedTuple):
    """Measured: seconds of an iteration, and of starting, saving and ending a training."""

    iteration_s: float
    overhead_s: float


class OutOfMemoryError(RuntimeError):
    """The batch does not fit."""


def probe(task: str, config_file: Path, batch: int) -> Probe:
    """Run a short training with the configuration, without evaluation.

    Raises:
        OutOfMemoryError: the memory does not suffice.
        ValueError: the training fails, with its last words, or its log has no times.
    """
    start = time.perf_counter()
    with TemporaryDirectory(prefix="probe-") as folder:
        _run(task, config_file, _ITERATIONS, batch, Path(folder))
        iteration_s = logged_seconds(Path(folder))
    if iteration_s is None:
        raise ValueError(f"{config_file}: the log of a short training has no times of iterations")
    overhead_s = time.perf_counter() - start - _ITERATIONS * iteration_s
    logger.info("measured: %.2f s an iteration of %d images", iteration_s, batch)
    return Probe(iteration_s, max(0.0, overhead_s))


def logged_seconds(output: Path) -> float | None:
    """The median time of an iteration in the log of a training; None if it has none."""
    log = output / "log.txt"
    if not log.is_file():
        return None
    found = re.findall(r"\btime: (\d+\.\d+)", log.read_text(encoding="utf-8"))
    return median(map(float, found)) if found else None


def _run(task: str, config_file: Path, iterations: int, batch: int, folder: Path) -> None:
    words: list[object] = ["OUTPUT_DIR", folder, "DATASETS.TEST", ""]
    if task == "detection":
        words[-1] = "()"
        words += ["DATASETS.TEST_JSON", "", "DATASETS.TEST_IMAGES", ""]
    if task == "classification":  # counts in epochs
        lists = config_file.parent / "data"
        words += ["SOLVER.EPOCHS", 1, "SOLVER.WARMUP_EPOCHS", 0]
        words += ["DATASETS.TRAIN", _shortened(lists / "train.txt", iterations * batch)]
    else:
        words += ["SOLVER.MAX_ITER", iterations, "SOLVER.WARMUP_ITERS", 1]
    if task != "detection":
        words += ["SOLVER.LOG_PERIOD", 1]
    tool = top_level_folder("tools") / TOOLS[task]
    command = [sys.executable, str(tool), "--config-file", str(config_file), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    if done.returncode < 0 or _OUT_OF_MEMORY.search(done.stderr):
        raise OutOfMemoryError(done.stderr[-300:])
    last = done.stderr.strip().splitlines()[-12:]
    raise ValueError("a training of a few iterations fails:\n  " + "\n  ".join(last))


def _shortened(file: Path, num_lines: int) -> str:
    """The name of a list with so many lines of ``file``, which may repeat."""
    lines = file.read_text(encoding="utf-8").splitlines()
    step = max(1, len(lines) // num_lines)
    chosen = (lines[::step] * (1 + num_lines))[:num_lines]
    short = file.with_name("probe.txt")
    short.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return short.name
