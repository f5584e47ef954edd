"""The file that ``DATASETS.CLASSES`` names, in the folder of the data."""

from __future__ import annotations

from pathlib import Path


def read_class_lines(root: str | Path, source: str) -> list[str]:
    """The lines of ``root/source`` that are not blank.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(root, source)
    if not path.is_file():
        raise FileNotFoundError(f"DATASETS.CLASSES: no such file: {path}")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
