"""Where data sets are: ``datasets/`` here, or the folder that ``DETECTRON2_DATASETS`` names."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "DETECTRON2_DATASETS"
DEFAULT = "datasets"


def find_data(path: str | Path) -> Path:
    """``path``, or what stands for it in the folder of all data sets.

    A relative path below ``datasets/`` that does not exist here is looked for in the folder that
    the environment variable ``DETECTRON2_DATASETS`` names, as Detectron2 does for its built-in data
    sets. What exists here comes first; what exists nowhere is returned as it is.
    """
    path = Path(path)
    folder = os.environ.get(VARIABLE)
    if not folder or path.is_absolute() or path.parts[:1] != (DEFAULT,) or path.exists():
        return path
    elsewhere = Path(folder).expanduser().joinpath(*path.parts[1:])
    return elsewhere if elsewhere.exists() else path
