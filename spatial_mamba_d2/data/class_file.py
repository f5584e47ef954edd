"""Names of classes: the file that ``DATASETS.CLASSES`` names, and what a checkpoint holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spatial_mamba_d2.data.text_file import read_text_file

KEY = "DATASETS.CLASSES"


def read_class_lines(root: str | Path, source: str) -> list[str]:
    """The lines of ``root/source`` that are not blank, without white space around them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is in an unknown encoding.
    """
    text = read_text_file(Path(root, source), KEY)
    return [line.strip() for line in text.splitlines() if line.strip()]


def check_distinct(names: Sequence[str], source: str) -> None:
    """Raises ValueError if two classes have one name: scores are stored by name."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"{KEY} ({source}): names of classes must differ, got more than once: "
            f"{', '.join(map(repr, twice[:5]))}"
        )


def numbered_names(num_classes: int) -> tuple[str, ...]:
    """Names of classes that have none."""
    return tuple(f"class {index}" for index in range(num_classes))


def compare_class_names(
    checkpoint: Sequence[str] | None,
    data: Sequence[str] | None,
    source: str,
    *,
    where: str = KEY,
    order_counts: bool = True,
) -> str:
    """A sentence about names of a checkpoint that differ from the data's, or "".

    Numbered names match any others.

    Args:
        checkpoint: None if it has no names.
        source: the checkpoint's file.
        where: what names the data's classes.
        order_counts: whether the same names in another order are an error. If weights are only
            where a training starts, that is a difference as any other.

    Raises:
        ValueError: the checkpoint has the same classes in another order: every prediction would be
            taken for another class.
    """
    if not isinstance(checkpoint, list | tuple) or not data or len(checkpoint) != len(data):
        return ""  # of another number, the shapes of the weights tell
    differing = [
        (index, theirs, ours)
        for index, (theirs, ours) in enumerate(zip(checkpoint, data, strict=True))
        if theirs != ours and not any(re.fullmatch(r"class \d+", str(n)) for n in (theirs, ours))
    ]
    if not differing:
        return ""
    index, theirs, ours = differing[0]
    first = f"class {index} is {theirs!r} in {source}, and {ours!r} in {where}"
    if sorted(map(str, checkpoint)) != sorted(data):
        return f"names of {len(differing)} classes differ: {first}"
    if order_counts:
        raise ValueError(
            f"{where} must have the order of the checkpoint's classes, got the same names in "
            f"another order: {first}"
        )
    return f"names of classes are the same in another order: {first}"
