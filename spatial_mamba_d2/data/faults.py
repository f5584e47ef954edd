"""What is wrong with data: collected, then raised together or skipped with a count."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import PIL

from spatial_mamba_d2 import __version__
from spatial_mamba_d2.system.once import once_per_machine

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
Item = TypeVar("Item")  # what names a sample: a record, a pair of files, a file and its class
Found = TypeVar("Found", bound=Mapping[str, Any])  # by a check
MAX_SHOWN = 10  # faults of each kind that a message lists
CHECKS_VERSION = 3  # increase it when a check finds other faults than before


class Fault(NamedTuple):
    """Why something is not usable: ``kind``, to count by, and ``reason``, which names the case."""

    kind: str
    reason: str


class Finding(NamedTuple):
    """A fault of labelled data: its kind, the file that has it, and a sentence that names it.

    ``box``: x1, y1, x2, y2 of the place in the image, in pixels, if it is at one.
    """

    kind: str
    file: str
    message: str
    box: tuple[float, float, float, float] | None = None


INACCESSIBLE = "inaccessible file"  # kind of faults that may pass without a change of any file


class InaccessibleFileError(ValueError):
    """The system cannot open or read a file, whatever its content: permissions, limits, disks."""


def reading_fault(kind: str, error: Exception) -> Fault:
    """The fault of a file that could not be read: of that kind, unless it was not accessible."""
    return Fault(INACCESSIBLE if isinstance(error, InaccessibleFileError) else kind, str(error))


def check_once(
    name: str, files: Iterable[str | Path], parameters: Any, check: Callable[[], Found]
) -> Found:
    """What ``check()`` returns, once per machine and files.

    That is remembered for unchanged files, unless a file could not be accessed.

    Args:
        name, files, parameters: see :func:`~spatial_mamba_d2.system.once.once_per_machine`.
        check: its result must be JSON, with ``faults``, lists that end in kind and reason.
    """
    limit = os.environ.get("SMD2_MAX_PIXELS")  # see data/images.py
    return once_per_machine(
        name,
        files,
        [__version__, CHECKS_VERSION, PIL.__version__, limit, parameters],
        check,
        keep=lambda found: all(kind != INACCESSIBLE for *_, kind, _ in found["faults"]),
    )


def settle_faults(
    faults: Sequence[Fault],
    on_error: OnError,
    *,
    where: Any,
    num_usable: int,
    harmless: Collection[str] = (),
) -> None:
    """Raise all faults as one error, or warn with their number for each kind.

    Args:
        on_error: what to do: ``"raise"`` or ``"skip"``.
        where: the file or folder that the faults are in, for the message.
        num_usable: what is left without them.
        harmless: kinds that are skipped in either case.

    Raises:
        ValueError: there are faults and ``on_error`` is ``"raise"``, or nothing is usable.
    """
    problems = [fault for fault in faults if fault.kind not in harmless]
    if not num_usable:
        raise ValueError(f"{where}: nothing is usable{_listing(problems)}")
    if problems and on_error == "raise":
        raise ValueError(
            f"{where}: problems found: {len(problems)}. Fix them, or skip what they affect with "
            f"DATASETS.ON_ERROR skip{_listing(problems)}"
        )
    for kind, reasons in _by_kind(faults).items():
        logger.warning(
            "%s: skipped because of %s: %d, the first: %s", where, kind, len(reasons), reasons[0]
        )


def _by_kind(faults: Sequence[Fault]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault.reason)
    return kinds


def _listing(faults: Sequence[Fault]) -> str:
    """The first faults of each kind, one per line, to append to a sentence."""
    lines = []
    for kind, reasons in _by_kind(faults).items():
        lines.append(f"{kind}: {len(reasons)}")
        lines += [f"  {reason}" for reason in reasons[:MAX_SHOWN]]
        if len(reasons) > MAX_SHOWN:
            lines.append(f"  and {len(reasons) - MAX_SHOWN} more")
    return "".join(f"\n  {line}" for line in lines)


def check_on_error(on_error: str) -> None:
    """Raises ValueError for anything but ``"raise"`` and ``"skip"``."""
    if on_error not in get_args(OnError):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')


def read_or_skip(
    read: Callable[[Item], Any], item: Item, on_error: OnError
) -> tuple[Any, str | None]:
    """``(read(item), None)``, or ``(None, message)`` if it is broken and to be skipped.

    Raises:
        OSError, ValueError: from ``read``, if ``on_error`` is ``"raise"``.
    """
    try:
        return read(item), None
    except (OSError, ValueError) as error:
        if on_error == "raise":
            raise
        return None, str(error)
