"""The meaning of what label files store: which value or colour is which class, or ignored."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spatial_mamba_d2.data import label_conventions
from spatial_mamba_d2.data.class_indices import IGNORE, MAX_CLASSES, ignore_index, index_dtype
from spatial_mamba_d2.data.text_file import read_text_file

logger = logging.getLogger(__name__)

KEY = "DATASETS.LABEL_MAP"

_ENTRY = re.compile(
    r"""\s* (?P<quote>["']?)
    (?: (?P<low>-?\d+) (?: \s*(?:-|\.\.)\s* (?P<high>\d+) )?
      | \#(?P<hex>[0-9a-fA-F]{6})
      | [\[(]? \s* (?P<r>\d+) \s*[,\s]\s* (?P<g>\d+) \s*[,\s]\s* (?P<b>\d+) \s* [\])]?
      | (?P<other>\*|other)
    ) (?P=quote) \s* :\s* (?P<class>"[^"]*"|'[^']*'|[^,;\n]*?)
    (?: [^\S\n]+\#(?=\s|$)[^\n]* | \s* ) (?:[,;\n]|$)""",
    re.VERBOSE,
)
_COMMENT = re.compile(r"\s*(?:\#(?=\s|$).*)?(?:\n|$)")
_FILE = re.compile(r".+\.(txt|ya?ml|json|csv)", re.IGNORECASE)


@dataclass(frozen=True)
class LabelFormat:
    """What the integers or colours in label files mean.

    Attributes:
        num_classes: class k, from 0, is stored as ``k + offset``.
        offset: 1 in ADE20K, 0 where files hold class indices.
        ignored: integers of pixels that neither train nor count.
        values, colors: stored integer, or colour ``r << 16 | g << 8 | b``, and its class or
            :attr:`ignore`. If there are any, ``offset`` and ``ignored`` have no effect.
        other: the class, or :attr:`ignore`, of everything that is not among these.

    Raises:
        ValueError: there are fewer classes than 2 or more than 65535, an ignored integer is a
            class, or something is mapped to an unknown class.
    """

    num_classes: int
    offset: int = 1
    ignored: tuple[int, ...] = (0,)
    values: tuple[tuple[int, int], ...] = ()
    colors: tuple[tuple[int, int], ...] = ()
    other: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(
                f"num_classes must be 2..{MAX_CLASSES} (background is a class), "
                f"got {self.num_classes}"
            )
        if self.is_map:
            others = [] if self.other is None else [("other", self.other)]
            for stored, index in (*self.values, *self.colors, *others):
                if index != self.ignore and not 0 <= index < self.num_classes:
                    raise ValueError(
                        f"{KEY} must map to classes 0..{self.num_classes - 1} (MODEL.NUM_CLASSES "
                        f"{self.num_classes}) or ignore, got {index} for {stored}"
                    )
            return
        classes = range(self.offset, self.offset + self.num_classes)
        if taken := sorted(set(self.ignored) & set(classes)):
            raise ValueError(
                f"DATASETS.IGNORE_LABELS must be none of the classes' labels {classes.start}.."
                f"{classes.stop - 1}, got {taken[0]}"
            )

    @property
    def ignore(self) -> int:
        """The index of what is no class; see :mod:`~spatial_mamba_d2.data.class_indices`."""
        return ignore_index(self.num_classes)

    @property
    def is_map(self) -> bool:
        """Whether values and colours are listed one by one."""
        return bool(self.values or self.colors)

    @property
    def only_colors(self) -> bool:
        """Whether grey and palette files too are to be read as colours."""
        return bool(self.colors) and not self.values

    def _known(self, color: bool, present: Sequence[int]) -> list[int | None]:
        """The class or :attr:`ignore` of stored integers or colours; None: it means nothing."""
        if self.is_map:
            table = dict(self.colors if color else self.values)
            return [table.get(stored, self.other) for stored in present]
        if color:
            return [None] * len(present)
        indices = ((stored, stored - self.offset) for stored in present)
        return [
            self.ignore
            if stored in self.ignored
            else index
            if 0 <= index < self.num_classes
            else None
            for stored, index in indices
        ]

    def to_indices(self, stored: np.ndarray) -> np.ndarray:
        """Content of a file -> class indices and :attr:`ignore`, ``uint8`` or ``uint16 [H, W]``.

        Args:
            stored: integers ``[H, W]``, or colours ``uint8[H, W, 3]``.

        Raises:
            ValueError: an integer or colour is neither a class nor ignored.
        """
        color = stored.ndim == 3
        if color:
            red, green, blue = (stored[..., channel].astype(np.int32) for channel in range(3))
            stored = red << 16 | green << 8 | blue
        # Values of at most 16 bits are looked up in a table, others searched for.
        small = stored.dtype.kind == "u" and stored.dtype.itemsize <= 2
        present = np.flatnonzero(np.bincount(stored.ravel())) if small else np.unique(stored)
        known = self._known(color, present.tolist())
        if None in known:
            wrong = [v for v, k in zip(present.tolist(), known, strict=True) if k is None]
            raise ValueError(self._impossible(wrong, present.tolist(), color))
        classes = np.array(known, index_dtype(self.num_classes))
        if not small:
            return classes[np.searchsorted(present, stored)]
        table = np.zeros(int(present.max(initial=0)) + 1, classes.dtype)
        table[present] = classes
        return table[stored]

    def to_stored(self, indices: np.ndarray) -> np.ndarray:
        """The inverse: class indices ``[H, W]`` -> what label files store.

        Of several stored values for one class, the first one that is listed.

        Returns:
            ``uint8`` or ``uint16 [H, W]``, or colours ``uint8[H, W, 3]`` if only these are known.

        Raises:
            ValueError: a class has no stored value, or one that does not fit into 16 bits.
        """
        if not self.is_map:
            first = {index: index + self.offset for index in range(self.num_classes)}
        else:
            pairs = self.colors if self.only_colors else self.values
            first = {}
            for stored, index in pairs:
                first.setdefault(index, stored)
        if missing := [index for index in range(self.num_classes) if index not in first]:
            raise ValueError(f"{KEY} has no stored value of class {missing[0]} to write")
        table = np.array([first[index] for index in range(self.num_classes)], np.int64)
        if self.only_colors:
            shifts = np.array([16, 8, 0])
            return (table[:, None] >> shifts & 255).astype(np.uint8)[indices]
        if table.min() < 0 or table.max() > 0xFFFF:
            raise ValueError(
                f"stored labels must be 0..65535 to be written, got {table.min()}..{table.max()}"
            )
        return table.astype(np.uint8 if table.max() <= 255 else np.uint16)[indices]

    def _impossible(self, wrong: Sequence[int], present: Sequence[int], color: bool) -> str:
        names = ", ".join(_name(value, color) for value in wrong[:5])
        if len(wrong) > 5:
            names += f" and {len(wrong) - 5} more"
        if self.is_map:
            listed = [_name(value, color) for value, _ in (self.colors if color else self.values)]
            more = ", ..." if len(listed) > 20 else ""
            kind = "colours" if color else "values"
            return (
                f"label {names} is impossible: {KEY} lists the {kind} "
                f"{', '.join(listed[:20]) or 'none'}{more}"
            )
        first, last = self.offset, self.offset + self.num_classes - 1
        return (
            f"label {names} is impossible: classes are {first}..{last}"
            f" (DATASETS.LABEL_OFFSET {self.offset}), ignored is "
            f"{', '.join(map(str, self.ignored)) or 'none'} (DATASETS.IGNORE_LABELS)"
            f"{self._hint(wrong, present)}"
        )

    def _hint(self, wrong: Sequence[int], present: Sequence[int]) -> str:
        if list(present) == [0, IGNORE]:
            return f'; if 255 is a class of its own: {KEY} "0: 0, 255: 1"'
        if self.offset == 1 and list(wrong) == [IGNORE]:
            return "; if 0 is a class and 255 ignored, the offset is 0"
        if self.offset == 0 and list(wrong) == [self.num_classes]:
            return "; if the classes begin at 1, the offset is 1"
        return f"; {KEY} says what other values mean"


def _name(value: int, color: bool) -> str:
    return f"#{value:06x}" if color else str(value)


def build_label_format(
    names: Sequence[str], offset: int, ignored: Iterable[int], label_map: str, root: str | Path
) -> LabelFormat:
    """From the values of ``DATASETS.LABEL_OFFSET``, ``IGNORE_LABELS`` and ``LABEL_MAP``.

    Args:
        names: of the classes.
        label_map: replaces the other two, unless it is ""; see :func:`parse_label_map`.
        root: the folder of the data.

    Raises:
        FileNotFoundError, ValueError: a value is not usable.
    """
    if not label_map.strip():
        return LabelFormat(len(names), offset, tuple(ignored))
    values, colors, other = parse_label_map(label_map, root, names)
    logger.info("%s replaces LABEL_OFFSET and IGNORE_LABELS", KEY)
    return LabelFormat(len(names), values=values, colors=colors, other=other)


def parse_label_map(
    text: str, root: str | Path, names: Sequence[str]
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...], int | None]:
    """``values``, ``colors`` and ``other`` of a :class:`LabelFormat` from ``DATASETS.LABEL_MAP``.

    An entry is ``STORED: CLASS``, and entries are separated by commas or lines. STORED is an
    integer, a range such as ``0-6``, a colour as ``#rrggbb`` or ``(r, g, b)``, or ``*`` for
    everything that is not listed. CLASS is an index, a name of a class, in quotation marks if it
    has a comma, or ``ignore``. A comment begins with ``# `` and ends with its line.

    Args:
        text: the entries, the name of a file in ``root`` with them, ``cityscapes`` for its label
            ids, or ``voc`` for Pascal VOC's palette and colours.
        names: of the classes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something is no entry, listed twice, or mapped to an unknown class.
    """
    if text.strip() in label_conventions.LABEL_MAPS:
        of_values, of_colors = label_conventions.LABEL_MAPS[text.strip()]
        return _of_classes(of_values, names), _of_classes(of_colors, names), None
    where = KEY
    if _FILE.fullmatch(text.strip()) and ":" not in text:
        path = Path(root, text.strip())
        text, where = read_text_file(path, KEY), f"{KEY} {path}"
    values: dict[int, int] = {}
    colors: dict[int, int] = {}
    other = None
    for entry in _entries(text, where):
        index = _class_index(entry["class"].strip("\"'").strip(), names, where)
        if entry["other"]:
            other = index
            continue
        is_color = entry["low"] is None
        table = colors if is_color else values
        for stored in [_color(entry, where)] if is_color else _integers(entry, where):
            if stored in table:
                raise ValueError(f"{where}: {_name(stored, is_color)} is listed twice")
            table[stored] = index
    if not values and not colors:
        raise ValueError(f"{where} must list stored values or colours, got {text!r}")
    return tuple(values.items()), tuple(colors.items()), other


def _of_classes(
    entries: tuple[tuple[int, int], ...], names: Sequence[str]
) -> tuple[tuple[int, int], ...]:
    """Entries of a convention, whose :data:`IGNORE` is a class where there are more."""
    return tuple((v, ignore_index(len(names)) if i == IGNORE else i) for v, i in entries)


def _entries(text: str, where: str) -> Iterable[re.Match[str]]:
    text = text.strip()
    if text.startswith("{") and text.endswith("}"):  # JSON, or a mapping of YAML
        text = text[1:-1]
    position = 0
    while position < len(text):
        if entry := _ENTRY.match(text, position):
            yield entry
        elif not (entry := _COMMENT.match(text, position)) or entry.end() == position:
            wrong = text[position:].strip().splitlines()[0][:60]
            raise ValueError(
                f"{where} must be entries such as 7: 0, #804080: road or 255: ignore, got {wrong!r}"
            )
        position = entry.end()


def _class_index(name: str, names: Sequence[str], where: str) -> int:
    if name.lower() == "ignore":
        return ignore_index(len(names))
    if name in names:
        return list(names).index(name)
    if re.fullmatch(r"\d+", name) and int(name) < len(names):
        return int(name)
    raise ValueError(
        f"{where}: a class must be 0..{len(names) - 1}, a name in DATASETS.CLASSES or ignore, "
        f"got {name!r}"
    )


def _color(entry: re.Match[str], where: str) -> int:
    if entry["hex"]:
        return int(entry["hex"], 16)
    red, green, blue = (int(entry[channel]) for channel in "rgb")
    if max(red, green, blue) > 255:
        raise ValueError(f"{where}: colours must be 0..255, got ({red}, {green}, {blue})")
    return red << 16 | green << 8 | blue


def _integers(entry: re.Match[str], where: str) -> range:
    low = int(entry["low"])
    high = low if entry["high"] is None else int(entry["high"])
    if not low <= high < low + 0x10000:
        raise ValueError(f"{where}: a range must be from low to high, got {low}-{high}")
    return range(low, high + 1)
