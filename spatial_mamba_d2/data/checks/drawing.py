"""The page of a report: counts, charts, and drawn examples of each kind of finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from spatial_mamba_d2.data.checks.report import DataReport, by_kind
from spatial_mamba_d2.data.class_indices import ignored_in
from spatial_mamba_d2.data.drawing import paint
from spatial_mamba_d2.data.faults import Finding
from spatial_mamba_d2.data.images import SUFFIXES, encode_image, read_image
from spatial_mamba_d2.data.label_maps import Pair, distinct_colors, read_pair
from spatial_mamba_d2.system import html_page

EXAMPLES = 4  # drawn of each kind of finding
_LISTED = 30  # messages of each kind
_SIDE_PX = 320
_MARK = (230, 60, 0)


def write_report_page(report: DataReport, path: Path) -> None:
    """One self-contained HTML file.

    Raises:
        OSError: it cannot be written.
    """
    html_page.write_page(path, f"Data: {report.data.path.name}", _sections(report))


def _sections(report: DataReport) -> Iterator[str]:
    data = report.data
    yield html_page.paragraph(
        f"{data.path.absolute()}: {data.format}, {data.task}, {report.num_images} images, "
        f"{len(data.classes)} classes"
    )
    if report.findings:
        yield html_page.paragraph(f"{len(report.findings)} findings", "bad")
        rows = [(kind, len(found)) for kind, found in by_kind(report.findings).items()]
        yield html_page.table(("kind", "findings"), rows)
    else:
        yield html_page.paragraph("Nothing is wrong.", "ok")
    yield html_page.items(report.notes)
    for kind, found in by_kind(report.findings).items():
        yield html_page.heading(f"{kind}: {len(found)}")
        drawn = (drawing for f in found[: 5 * EXAMPLES] if (drawing := _draw(f)) is not None)
        for number, (content, finding) in enumerate(drawn, start=1):
            yield html_page.figure(content, finding.message)
            if number == EXAMPLES:
                break
        yield html_page.items(finding.message for finding in found[:_LISTED])
        if len(found) > _LISTED:
            yield html_page.paragraph(f"and {len(found) - _LISTED} more")
    yield html_page.heading("Counts")
    yield html_page.table(
        ("split", "images", "objects, pixels or images"),
        [(s, f"{c.num_images:,}", f"{c.num_objects:,}") for s, c in report.counts.items()],
    )
    for split, count in report.counts.items():
        values = dict(zip(data.classes, map(float, count.by_class), strict=True))
        yield html_page.bar_chart(f"{split}: classes", values)
        if count.objects_an_image:
            yield html_page.bar_chart(
                f"{split}: images by number of objects", _binned(count.objects_an_image)
            )
        if count.object_px:
            yield html_page.bar_chart(
                f"{split}: objects by size in pixels", _sizes(count.object_px)
            )
    sizes = {f"{w} x {h}": float(n) for (h, w), n in report.image_sizes.most_common(15)}
    yield html_page.bar_chart("images by size, the most frequent ones", sizes)
    yield from _examples(report)


def _binned(counts: Counter[int]) -> dict[str, float]:
    bins = ((0, 0), (1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 50), (51, 10**9))
    return {
        f"{low}" if low == high else f"{low} to {high}" if high < 10**9 else f"over {low - 1}":
        float(sum(number for key, number in counts.items() if low <= key <= high))
        for low, high in bins
    }  # fmt: skip


def _sizes(sides: list[float]) -> dict[str, float]:
    edges = [0, 8, 16, 32, 64, 96, 128, 256, 512, np.inf]
    numbers, _ = np.histogram(sides, edges)
    names = [f"{low} to {high}" for low, high in zip(edges[:-2], edges[1:-1], strict=True)]
    return dict(zip([*names, "over 512"], map(float, numbers), strict=True))


def _examples(report: DataReport) -> Iterator[str]:
    """The first images of each split, as they are."""
    data = report.data
    yield html_page.heading("Images")
    for split, items in data.splits.items():
        for position, file in enumerate(data.image_files(split)[:EXAMPLES]):
            try:
                image = read_image(file)
                item = items[position] if isinstance(items, list) else None
                if isinstance(item, Pair) and data.labels is not None:
                    image = _overlay(image, read_pair(item, data.labels)[1])
            except (OSError, ValueError):
                continue
            yield html_page.figure(_encode(image), f"{split}: {file.name}")


def _overlay(image: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Half image, half colours of the classes; what is ignored stays black."""
    colors = paint(indices, distinct_colors(ignored_in(indices)))
    return (image // 2 + colors // 2).astype(np.uint8)


def _draw(finding: Finding) -> tuple[bytes, Finding] | None:
    """The image of a finding with its place, if it can be read."""
    file = Path(finding.file)
    if file.suffix.lower() not in SUFFIXES or not file.is_file():
        return None
    try:
        image = read_image(file)
    except (OSError, ValueError):
        return None
    if finding.box is not None:
        height, width = image.shape[:2]
        margin = max(height, width) // 8 if _leaves(finding.box, height, width) else 0
        image = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), constant_values=200)
        limit = 4 * max(height, width)
        corners = np.clip(np.array(finding.box) + margin, -limit, limit).astype(int).tolist()
        thickness = max(1, round(max(image.shape) / 160))
        image = np.ascontiguousarray(image)
        cv2.rectangle(image, tuple(corners[:2]), tuple(corners[2:]), _MARK, thickness)
    return _encode(image), finding


def _leaves(box: tuple[float, ...], height: int, width: int) -> bool:
    return min(box[:2]) < 0 or box[2] > width or box[3] > height


def _encode(image: np.ndarray) -> bytes:
    factor = min(1.0, _SIDE_PX / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    return encode_image(cv2.resize(image, size, interpolation=cv2.INTER_AREA), ".jpg")
