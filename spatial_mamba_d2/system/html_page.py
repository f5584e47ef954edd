"""Web pages that are one file: text, tables, charts and images, readable offline and on paper.

Charts are SVG without scripts; nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from spatial_mamba_d2.system.atomic import replacing

# Distinct for people who do not see all colours, and in print
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1rem; margin-bottom: .3rem }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } th { background: #f3f3f3 }
figure { display: inline-block; margin: .3rem .5rem .6rem 0; vertical-align: top; max-width: 22rem }
figcaption { font-size: .8rem; overflow-wrap: anywhere } img { max-width: 100%; height: auto }
code, pre { font-size: .85rem } pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem }
.ok { color: #00724f } .bad { color: #a33c00 } .scroll { overflow-x: auto }
@media print { body { margin: 0; max-width: none } h2 { break-after: avoid }
  figure { break-inside: avoid } }
""".strip()


def page(title: str, sections: Iterable[str]) -> str:
    """A complete document; each section is HTML, of the functions below."""
    body = "\n".join(sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def write_page(path: Path, title: str, sections: Iterable[str]) -> None:
    """Raises OSError if the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page(title, sections), encoding="utf-8")


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, style: str = "") -> str:
    attribute = f' class="{style}"' if style else ""
    return f"<p{attribute}>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def items(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def heat_table(
    names: Sequence[str], matrix: Sequence[Sequence[float]], columns: Sequence[str] | None = None
) -> str:
    """A table whose cells are the darker, the larger their share of the row is."""
    header = "".join(f"<th>{html.escape(name)}</th>" for name in ["", *(columns or names)])
    lines = []
    for name, row in zip(names, matrix, strict=True):
        total = sum(row) or 1
        cells = []
        for value in row:
            share = value / total
            color = "#fff" if share > 0.55 else "#1a1a1a"
            style = f"background: rgba(0, 90, 160, {share:.2f}); color: {color}"
            cells.append(f'<td style="{style}">{value:g}</td>')
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def figure(content: bytes, caption: str, kind: str = "jpeg") -> str:
    """An image, with the bytes of its file."""
    text = base64.b64encode(content).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/{kind};base64,{text}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def bar_chart(title: str, values: Mapping[str, float], unit: str = "") -> str:
    """A bar for each name."""
    largest = max(values.values(), default=0) or 1
    row_px, left_px, width_px = 18, 180, 360
    bars = []
    for position, (name, value) in enumerate(values.items()):
        y = position * row_px
        length = width_px * value / largest
        shown = name if len(name) <= 26 else f"{name[:25]}…"
        bars.append(
            f'<text x="{left_px - 6}" y="{y + 13}" text-anchor="end">{html.escape(shown)}</text>'
            f'<rect x="{left_px}" y="{y + 2}" width="{length:.1f}" height="{row_px - 4}" '
            f'fill="{COLORS[0]}"/>'
            f'<text x="{left_px + length + 5:.1f}" y="{y + 13}">{value:g}{html.escape(unit)}</text>'
        )
    return _svg(title, left_px + width_px + 90, row_px * len(values) + 4, "".join(bars))


def line_chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_name: str,
    y_name: str,
    *,
    limits: tuple[float, float, float, float] = (0, 1, 0, 1),
    diagonal: bool = False,
) -> str:
    """Lines through points (x, y).

    Args:
        limits: of x, low and high, and of y.
        diagonal: also the line from corner to corner, which is the ideal of a calibration.
    """
    left, top, width, height = 46, 10, 360, 240
    low_x, high_x, low_y, high_y = limits

    def place(x: float, y: float) -> str:
        across = (x - low_x) / (high_x - low_x or 1)
        up = (y - low_y) / (high_y - low_y or 1)
        return f"{left + width * across:.1f},{top + height * (1 - up):.1f}"

    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>'
    ]
    for step in range(5):
        share = step / 4
        x, y = low_x + share * (high_x - low_x), low_y + share * (high_y - low_y)
        parts.append(
            f'<text x="{left + width * share:.0f}" y="{top + height + 15}" '
            f'text-anchor="middle">{x:.3g}</text>'
            f'<text x="{left - 5}" y="{top + height * (1 - share) + 4:.0f}" '
            f'text-anchor="end">{y:.3g}</text>'
        )
    if diagonal:
        ends = f"{place(low_x, low_y)} {place(high_x, high_y)}"
        parts.append(f'<polyline points="{ends}" fill="none" stroke="#bbb" stroke-dasharray="4"/>')
    for index, (name, points) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        path = " ".join(place(x, y) for x, y in points)
        dash = ' stroke-dasharray="6 3"' if index >= len(COLORS) else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}"{dash} stroke-width="2"/>'
        )
        y = top + 14 + 15 * index
        parts.append(
            f'<rect x="{left + width + 10}" y="{y - 8}" width="12" height="4" fill="{color}"/>'
            f'<text x="{left + width + 27}" y="{y - 2}">{html.escape(name[:28])}</text>'
        )
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 32}" text-anchor="middle">'
        f"{html.escape(x_name)}</text>"
        f'<text x="12" y="{top + height / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {top + height / 2})">{html.escape(y_name)}</text>'
    )
    tall = max(top + height + 38, top + 20 + 15 * len(lines))
    return _svg(title, left + width + 220, tall, "".join(parts))


def _svg(title: str, width: float, height: float, content: str) -> str:
    return (
        f"<h3>{html.escape(title)}</h3>"
        f'<svg role="img" aria-label="{html.escape(title)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-size="11" font-family="system-ui, sans-serif" '
        f'fill="#1a1a1a">{content}</svg>'
    )
