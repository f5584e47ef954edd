"""The command that installs packages into the environment of the running Python: pip's, or uv's.

Environments made by ``uv venv`` have no pip. uv takes pip's arguments.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which


def pip_command(command: str, *arguments: str | Path) -> list[str]:
    """``pip COMMAND ARGUMENTS`` for this environment, to run or, by ``shlex.join``, to show.

    Without pip and uv, it is a command whose own message says that there is no pip.
    """
    words = [command, *map(str, arguments)]
    if not find_spec("pip") and (uv := which("uv")):
        return [uv, "pip", command, "--python", sys.executable, *words[1:]]
    return [sys.executable, "-m", "pip", *words]
