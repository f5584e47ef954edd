"""What the values or colours in label files mean, if no configuration says it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spatial_mamba_d2.data.ade20k import class_names_in
from spatial_mamba_d2.data.class_file import numbered_names, read_class_lines
from spatial_mamba_d2.data.class_indices import IGNORE, ignore_index
from spatial_mamba_d2.data.formats.records import UnusableDataError
from spatial_mamba_d2.data.label_conventions import CLASSES, LABEL_MAPS
from spatial_mamba_d2.data.label_format import LabelFormat
from spatial_mamba_d2.data.label_maps import Pair, read_label

SAMPLE = 300  # label files that are looked at
_MAX_COLORS = 64  # more are no classes, but shades
_NAME_FILES = (
    "objectInfo*.txt", "labelmap.txt", "label_colors.txt", "class_dict.csv", "_classes.csv",
    "classes.txt", "labels.txt", "names.txt", "class_names.txt", "categories.txt",
)  # fmt: skip
_UNLABELLED = {"void", "ignore", "__ignore__", "unlabelled", "unlabeled"}
_COLOR = re.compile(
    r"(?P<before>.*?)[\s,:;]*\b(?P<r>\d{1,3})[\s,]+(?P<g>\d{1,3})[\s,]+(?P<b>\d{1,3})\b"
    r"[\s,:;]*(?P<after>.*)"
)
_HEX = re.compile(r"(?P<before>.*?)[\s,:;]*#(?P<hex>[0-9a-fA-F]{6})\b[\s,:;]*(?P<after>.*)")
_NUMBERED = re.compile(r"(?P<value>\d+)\s*,\s*(?P<name>\S.*)")
# Both are given a meaning, so that a file is read as what it holds.
_ANY = LabelFormat(2, values=((0, 0),), colors=((0, 0),))


class NameTable(NamedTuple):
    """What a file of classes says: names, and the stored value or colour of each, if it does."""

    names: tuple[str, ...]
    colors: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    source: Path | None = None
    counts_from_1: bool = False


def find_names(folders: Sequence[Path]) -> NameTable | None:
    """The first file of classes in the folders; None if there is none.

    Raises:
        ValueError: it is no text.
    """
    for folder in folders:
        for pattern in _NAME_FILES:
            for file in sorted(folder.glob(pattern)):
                return _read_table(file)
    return None


def _read_table(file: Path) -> NameTable:
    lines = [line for line in read_class_lines(file.parent, file.name) if not line.startswith("# ")]
    if lines and lines[0].startswith("Idx\t"):
        return NameTable(class_names_in(lines), source=file, counts_from_1=True)
    rows = [row for line in lines if (row := _HEX.fullmatch(line) or _COLOR.fullmatch(line))]
    if len(rows) >= max(1, len(lines) - 1):
        names = tuple((row["before"] or row["after"]).strip(" ,:;\t") for row in rows)
        return NameTable(names, tuple(map(_packed, rows)), source=file)
    numbered = [row for line in lines if (row := _NUMBERED.fullmatch(line))]
    if len(numbered) >= max(1, len(lines) - 1):
        names = tuple(row["name"].strip() for row in numbered)
        return NameTable(names, values=tuple(int(row["value"]) for row in numbered), source=file)
    return NameTable(tuple(lines), source=file)


def _packed(row: re.Match[str]) -> int:
    if "hex" in row.groupdict():
        return int(row["hex"], 16)
    red, green, blue = (min(255, int(row[channel])) for channel in "rgb")
    return red << 16 | green << 8 | blue


def count_stored(pairs: Sequence[Pair]) -> tuple[Counter[int], Counter[int]]:
    """Pixels of each integer and of each colour in a sample of the label files.

    Raises:
        UnusableDataError: none of them can be read as a label map.
    """
    reason = ""
    values: Counter[int] = Counter()
    colors: Counter[int] = Counter()
    step = max(1, len(pairs) // SAMPLE)
    for pair in pairs[::step]:
        try:
            stored = read_label(pair.label, _ANY)
        except (OSError, ValueError) as error:
            reason = reason or str(error)  # the checks report each one
            continue
        counts = values
        if stored.ndim == 3:
            red, green, blue = (stored[..., channel].astype(np.int32) for channel in range(3))
            stored, counts = red << 16 | green << 8 | blue, colors
        present, numbers = np.unique(stored, return_counts=True)
        counts.update(dict(zip(present.tolist(), numbers.tolist(), strict=True)))
    if not values and not colors:
        raise UnusableDataError(f"none of the label maps can be read: {reason}")
    return values, colors


def decide(
    pairs: Sequence[Pair], table: NameTable | None, is_voc: bool
) -> tuple[tuple[str, ...], LabelFormat, str]:
    """Names of the classes, the meaning of what is stored, and a sentence that says it.

    Args:
        table: what a file of classes says.
        is_voc: whether the folders are Pascal VOC's, whose classes are known.

    Raises:
        UnusableDataError: no label file can be read, or there are too many colours to be classes.
    """
    values, colors = count_stored(pairs)
    if table is None and is_voc:
        names = CLASSES["voc"][0]
        known, palette = LABEL_MAPS["voc"]
        return names, LabelFormat(len(names), values=known, colors=palette), "labels as in VOC"
    if sum(colors.values()) > sum(values.values()):
        return _by_color(colors, table, pairs)
    return _by_value(values, table)


def _by_color(
    colors: Counter[int], table: NameTable | None, pairs: Sequence[Pair]
) -> tuple[tuple[str, ...], LabelFormat, str]:
    if table is not None and table.colors:
        stored = list(zip(table.colors, table.names, strict=True))
        text = f"colours of {table.source}"
    else:
        if len(colors) > _MAX_COLORS:
            raise UnusableDataError(
                f"{pairs[0].label.parent}: labels have {len(colors)} colours, which are no classes;"
                " a file of colours such as label_colors.txt must say which are"
            )
        stored = [(color, f"#{color:06x}") for color in sorted(colors)]
        if table is not None and len(table.names) == len(stored):
            stored = [(c, name) for (c, _), name in zip(stored, table.names, strict=True)]
        text = f"{len(stored)} colours, each a class"
    names = tuple(name for _, name in stored if name.lower() not in _UNLABELLED)
    ignored = ignore_index(len(names))
    entries = [(c, names.index(n) if n in names else ignored) for c, n in stored]
    return _checked(names, text, colors=tuple(entries))


def _by_value(
    values: Counter[int], table: NameTable | None
) -> tuple[tuple[str, ...], LabelFormat, str]:
    present = sorted(values)
    if table is not None and table.values:
        entries = list(zip(table.values, table.names, strict=True))
        names = tuple(name for _, name in entries if name.lower() not in _UNLABELLED)
        nothing = ignore_index(len(names))
        known = [(v, names.index(n) if n in names else nothing) for v, n in entries]
        if nothing not in table.values:
            known.append((nothing, nothing))
        return _checked(names, f"values of {table.source}", values=tuple(known))
    names = table.names if table is not None else ()
    if present == [0, IGNORE] and len(names) in (0, 1, 2):
        foreground = names[-1:] or ("foreground",)
        names = names if len(names) == 2 else ("background", *foreground)
        return _checked(names, "0 is background, 255 foreground", values=((0, 0), (IGNORE, 1)))
    if names:
        num_classes = len(names)
        lost = {
            offset: sum(
                number
                for value, number in values.items()
                if not offset <= value < offset + num_classes and value not in (0, IGNORE)
            )
            for offset in (0, 1)
        }
        offset = 1 if table and table.counts_from_1 else min(lost, key=lambda o: (lost[o], o))
        ignored: tuple[int, ...] = (0, IGNORE) if offset else (IGNORE,)
        if IGNORE - offset < num_classes:
            ignored = ignored[:-1]
        text = f"class k, from 0, is stored as k + {offset}; ignored: {ignored}"
        return _checked(names, text, offset=offset, ignored=ignored)
    classes = [value for value in present if value != IGNORE]
    if classes == list(range(len(classes))):
        text = f"classes 0..{len(classes) - 1}; 255 is ignored"
        return _checked(numbered_names(len(classes)), text, offset=0, ignored=(IGNORE,))
    names = tuple(f"value {value}" for value in classes)
    known = [(value, index) for index, value in enumerate(classes)]
    text = f"values {', '.join(map(str, classes[:10]))}, each a class; 255 is ignored"
    return _checked(names, text, values=(*known, (IGNORE, IGNORE)))


def _checked(
    names: Sequence[str], text: str, **meaning: object
) -> tuple[tuple[str, ...], LabelFormat, str]:
    try:
        return tuple(names), LabelFormat(len(names), **meaning), text  # type: ignore[arg-type]
    except ValueError as error:
        raise UnusableDataError(f"labels: {error} ({text})") from None
