"""Tables as text: Markdown for files and documents, columns of fixed width for a console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of ``| a | b |``; each row needs a cell for every column of the header.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    lines = [header, ["---"] * len(header), *_checked(header, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def console_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first is aligned left, the others right.

    Raises:
        ValueError: a row has another number of cells than the header.
    """
    lines = [header, *_checked(header, rows)]
    first_width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([first.ljust(first_width), *map(str.rjust, others, widths)]).rstrip()
        for first, *others in lines
    )


def _checked(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[Sequence[str]]:
    rows = list(rows)
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows must have {len(header)} cells each, got {list(row)}")
    return rows
