"""Which exceptions are a user's mistake, told in one line, and which are faults of this package.

A user's mistake is what a check of this package has found and raised by name, what the operating
system says about a file, and a package that is not installed. A ``ValueError`` that a library
raises, or one that Python raises in our code (``int("x")``), is a fault of ours: its traceback is
what a report needs. So the question is where the exception comes from: from a ``raise`` statement
of ours. Exceptions of worker processes come as the text of their tracebacks, which answers it too.
"""

from __future__ import annotations

import errno
import opcode
import os
import re
import shlex
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from .installer import pip_command

PACKAGE = "spatial_mamba_d2"
_RAISE = opcode.opmap["RAISE_VARARGS"]
# Types that our checks raise, and the exit code of each.
_EXIT_CODES: dict[type[Exception], int] = {
    ValueError: 2,
    OSError: 2,
    ImportError: 2,
    FloatingPointError: 1,  # a training that diverged; the command was accepted
}
# What a full or read-only disk says while a file that is already open is written.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
_REMOTE = re.compile(r"-- Process \d+ terminated with the following error:|^Caught \w+ in ")
_FRAME = re.compile(
    r'^ +File "(?P<file>[^"\n]+)", line \d+, in .+(?:\n(?! +File ") +(?P<source>.+))?', re.MULTILINE
)
_OUTCOME = re.compile(r"^(?P<type>[A-Za-z_][\w.]*)(?:: (?P<text>.*))?\Z", re.MULTILINE | re.DOTALL)
_BY_SYSTEM = re.compile(r"\[Errno (\d+)\] (.*): '(.*)'", re.DOTALL)


class Mistake(NamedTuple):
    """What to tell a user, without "error: ", and the exit code."""

    text: str
    exit_code: int


def find_mistake(error: BaseException) -> Mistake | None:
    """The mistake of the user that ``error`` stands for; None if it is a fault of ours.

    Args:
        error: caught, with its traceback; also one that ``torch.multiprocessing`` or a
            ``DataLoader`` raises for a worker process.
    """
    if _REMOTE.search(text := str(error)):
        return _find_remote_mistake(text)
    exit_code = _exit_code(type(error))
    if exit_code is None:
        return None
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing_module(error.name, text)
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is not None:
            return Mistake(_of_file(error.strerror or text, os.fsdecode(error.filename)), exit_code)
        if error.errno in _DISK:
            return Mistake(text, exit_code)
    return Mistake(text, exit_code) if _is_raised_by_us(error.__traceback__) else None


def _exit_code(kind: type[BaseException]) -> int | None:
    return next((code for known, code in _EXIT_CODES.items() if issubclass(kind, known)), None)


def _of_file(reason: str, name: str) -> str:
    return f"{Path(name).absolute()}: {reason}"


def _missing_module(name: str, text: str) -> Mistake | None:
    if name == f"{PACKAGE}.ops":
        folder = Path(__file__).parents[2]
        command = shlex.join(pip_command("install", "--no-build-isolation", "--editable", folder))
        return Mistake(f"{PACKAGE} in {folder} is not installed: {command}", 2)
    if name.split(".")[0] == PACKAGE:
        return None
    return Mistake(f"{text}; `{sys.executable} -m {PACKAGE}.doctor` shows what to install", 2)


def _is_raised_by_us(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is ours and executes a ``raise`` statement."""
    if traceback is None:
        return False
    while traceback.tb_next:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    module = frame.f_globals.get("__name__", "")
    ours = module == "__main__" or module.split(".")[0] == PACKAGE
    return ours and frame.f_code.co_code[traceback.tb_lasti] == _RAISE


def _find_remote_mistake(text: str) -> Mistake | None:
    """The same from a worker's traceback, in which those of further workers may be nested."""
    frames = list(_FRAME.finditer(text))
    if not frames:
        return None
    outcome = _OUTCOME.search(text, frames[-1].end())
    if outcome is None:
        return None
    message = (outcome["text"] or "").strip()
    module_name, _, name = outcome["type"].rpartition(".")
    kind = getattr(sys.modules.get(module_name or "builtins"), name, None)
    exit_code = _exit_code(kind) if isinstance(kind, type) else None
    if exit_code is None:
        return None
    if kind is ModuleNotFoundError and (module := re.search("'(.+?)'", message)):
        return _missing_module(module[1], message)
    if by_system := _BY_SYSTEM.fullmatch(message):
        return Mistake(_of_file(by_system[2], by_system[3]), exit_code)
    innermost = frames[-1]
    raised = (innermost["source"] or "").startswith("raise ") and _is_our_file(innermost["file"])
    return Mistake(message, exit_code) if raised else None


def _is_our_file(name: str) -> bool:
    folders = [
        folder
        for module in (PACKAGE, f"{PACKAGE}.ops")
        for folder in getattr(sys.modules.get(module), "__path__", ())
    ]
    return any(Path(name).is_relative_to(folder) for folder in folders)
