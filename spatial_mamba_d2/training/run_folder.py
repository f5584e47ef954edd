"""``OUTPUT_DIR`` as the folder of one training: who writes it, and what it holds already.

Nothing here needs Lightning or Detectron2: all trainers use it.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spatial_mamba_d2.system.atomic import replacing

logger = logging.getLogger(__name__)

CONFIG, METRICS = "config.yaml", "metrics.json"
# What --resume continues, as Lightning and Detectron2 name it.
LAST, LAST_MARK = "last.ckpt", "last_checkpoint"
BEST, DETECTION_BEST = "best.ckpt", "model_best.pth"
BEST_SCORE = "best_score"  # key of both
_CHECKPOINTS = (LAST, BEST, DETECTION_BEST, "model_final.pth", "model_[0-9]*.pth")
# What a training leaves behind, in any task; other files, such as weights to start from, are not.
_TRACES = (CONFIG, METRICS, LAST_MARK, *_CHECKPOINTS)
_LOCK, _HOLDER = ".training.lock", ".training.json"
# The processes that loaded data for a killed training keep its lock until they have ended too.
_FREED_S = 15
# Of flock on a network file system without locks, or on one in user space.
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def claimed(
    folder: str | Path, *, resume: bool, last: str, is_first_process: bool = True
) -> Iterator[None]:
    """Within it, no other training writes to ``folder``; only the first process of a run asks.

    The operating system frees the lock when the process ends, however it ends. On a network file
    system this holds between machines only if that has locks (NFS 4 has). Without any, a warning
    says so, and what is refused is a training whose process lives on this machine.

    Args:
        last: the name of the file in ``folder`` by which a training is resumed.

    Raises:
        ValueError: another training is running in ``folder``; without ``resume``, it holds one;
            with it, it holds checkpoints of one, but not ``last``.
        OSError: ``folder`` cannot be written.
    """
    if not is_first_process:
        yield
        return
    folder = Path(folder)
    lock = _acquire(folder)
    try:
        if not resume:
            refuse_another_run(folder)
        elif not (folder / last).is_file():
            _refuse_lost_run(folder, last)
        yield
    finally:
        (folder / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _find(folder: Path, patterns: Iterable[str]) -> str:
    """Names of files in it that are not empty, to be shown; "" if there are none."""
    files = {path for pattern in patterns for path in folder.glob(pattern)}
    found = sorted(path.name for path in files if path.stat().st_size)
    return ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")


def checkpoints_and_metrics(folder: Path) -> str:
    """The names of what only a training writes to a folder; "" if there is nothing."""
    return _find(folder, (METRICS, LAST_MARK, *_CHECKPOINTS))


def refuse_another_run(folder: Path) -> None:
    """Raises ValueError if ``folder`` holds a training, whose files a new one would replace."""
    if found := _find(folder, _TRACES):
        raise ValueError(
            f"OUTPUT_DIR {folder} holds another training ({found}): continue it with --resume, "
            "or choose another OUTPUT_DIR; nothing was changed"
        )


def _refuse_lost_run(folder: Path, last: str) -> None:
    """A training that was killed before its first checkpoint has none to lose."""
    if found := _find(folder, _CHECKPOINTS):
        raise ValueError(
            f"--resume: OUTPUT_DIR {folder} holds another training ({found}), but no {last} to "
            "continue it from: choose another OUTPUT_DIR for a new training; nothing was changed"
        )


def _acquire(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, fallback_to_soft=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = _read_holder(folder)
            if not _has_ended(holder):
                raise ValueError(_in_use(folder, holder)) from None
            try:
                lock.acquire(timeout=_FREED_S)
            except Timeout:
                raise ValueError(_in_use(folder, holder)) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            holder = _read_holder(folder)
            here = holder.get("host") == platform.node() and holder["pid"] != os.getpid()
            if here and not _has_ended(holder):
                raise ValueError(_in_use(folder, holder)) from None
            logger.warning(
                "%s: its file system has no locks; start no second training in it", folder
            )
        holder = {"pid": os.getpid(), "host": platform.node()}
        (folder / _HOLDER).write_text(json.dumps(holder), encoding="utf-8")
    except OSError as error:
        raise type(error)(
            error.errno, f"OUTPUT_DIR {folder} cannot be written: {error.strerror or error}"
        ) from None
    return lock


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "an unknown process"
    return (
        f"OUTPUT_DIR {folder} is used by another training ({who}): wait for its end, or choose "
        "another OUTPUT_DIR"
    )


def _read_holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return {"pid": int(holder["pid"]), "host": str(holder["host"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more."""
    if not holder or holder["host"] != platform.node() or sys.platform == "win32":
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def tell_new_training(folder: str | Path) -> None:
    """Where ``--resume`` finds nothing to continue."""
    logger.warning("--resume: %s has no checkpoint; a new training starts", folder)


def write_config(cfg: Any, folder: str | Path) -> None:
    """``config.yaml``, the record of a run's settings: call once an iteration has succeeded."""
    with replacing(Path(folder, CONFIG)) as temporary:
        temporary.write_text(cfg.dump(), encoding="utf-8")


class _WithoutTraceback(logging.Filter):
    """Drops what a library logs about exceptions that explain themselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        return kind is None or not issubclass(kind, FloatingPointError | OSError | ValueError)


@contextmanager
def log_end(library_logger: str) -> Iterator[None]:
    """Within it, an exception is written into ``log.txt``; standard error gets it from the tool.

    Args:
        library_logger: the one that would print it too.
    """
    library, only_ours = logging.getLogger(library_logger), _WithoutTraceback()
    library.addFilter(only_ours)
    try:
        yield
    except Exception as error:
        text = f"ended by {type(error).__name__}: {error}"
        record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), None)
        for handler in logging.getLogger("spatial_mamba_d2").handlers:
            if getattr(handler, "stream", None) not in (sys.stdout, sys.stderr):
                handler.handle(record)
        raise
    finally:
        library.removeFilter(only_ours)


def score_of_iteration(folder: str | Path, iteration: int, name: str) -> float | None:
    """The score that ``metrics.json`` has of the evaluation after so many iterations, if any."""
    return read_scores(folder, name).get(iteration - 1)


def read_scores(folder: str | Path, name: str) -> dict[int, float]:
    """``{iteration, from 0: score}`` of ``metrics.json``; the last of a repeated iteration."""
    scores = {}
    try:
        with Path(folder, METRICS).open(encoding="utf-8") as file:
            for line in file:
                if f'"{name}"' in line:
                    content = _parse(line)
                    if isinstance(content.get("iteration"), int) and name in content:
                        scores[content["iteration"]] = float(content[name])
    except OSError:
        pass
    return scores


def evaluations_without_gain(scores: Mapping[int, float]) -> list[int]:
    """After each evaluation, how many brought no new best score since; NaN is none.

    Args:
        scores: by iteration, in any order; higher is better.
    """
    best, count, counts = -math.inf, 0, []
    for _, score in sorted(scores.items()):
        count = 0 if score > best else count + 1
        best = max(best, score) if score == score else best
        counts.append(count)
    return counts


def patience_ends(scores: Mapping[int, float], patience: int, name: str) -> str:
    """Why a training ends after the last of its ``scores``; "" if it goes on.

    Args:
        patience: evaluations without a new best score; 0: it always goes on.
        name: of the score.
    """
    counts = evaluations_without_gain(scores)
    if not patience or not counts or counts[-1] < patience:
        return ""
    return f"{name} has not risen in {patience} evaluations"


def _parse(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:  # the last line of a killed process
        return {}
    return content if isinstance(content, dict) else {}
