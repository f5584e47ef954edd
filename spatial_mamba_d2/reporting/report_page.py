"""The page of a report: tables, charts, and images that are drawn with truth and prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from spatial_mamba_d2.data.drawing import enlarge, enlargement, paint
from spatial_mamba_d2.data.images import encode_image
from spatial_mamba_d2.data.label_maps import distinct_colors
from spatial_mamba_d2.evaluation import Evaluation
from spatial_mamba_d2.evaluation.evaluation import LEVEL, expected_error
from spatial_mamba_d2.reporting.evaluated_run import Run
from spatial_mamba_d2.system import html_page

_DRAWN = 8  # worst images, and suspects
_SIDE_PX = 420
_MOST_CLASSES = 40  # of a confusion matrix; more are cut to the most confused ones
_TRUTH, _PREDICTION = (0, 170, 80), (230, 90, 0)


def write_page(path: Path, runs: Sequence[Run], content: Mapping[str, Any]) -> None:
    """One self-contained HTML file; raises OSError if it cannot be written."""
    html_page.write_page(path, f"Report: {', '.join(run.name for run in runs)}",
                         _sections(runs, content))  # fmt: skip


def _sections(runs: Sequence[Run], content: Mapping[str, Any]) -> Iterator[str]:
    yield _summary(runs)
    if content["comparisons"]:
        yield html_page.heading("Comparison")
        yield html_page.table(
            ("runs", "difference", f"{LEVEL:.0%} interval", ""),
            map(_compared, content["comparisons"]),
        )
        yield html_page.paragraph(
            "Differences are of the second run to the first, over the same draws of images."
        )
    for run, recorded in zip(runs, content["runs"], strict=True):
        for what, evaluation in run.evaluations.items():
            yield html_page.heading(f"{run.name}: {what}")
            yield html_page.paragraph(f"Protocol: {run.protocol}.")
            yield from _evaluation(evaluation)
            yield from _drawings(run, evaluation)
        yield html_page.heading(f"{run.name}: origin", 3)
        keys = ("weights", "sha256", "data", "num_images", "data_fingerprint", "protocol")
        yield html_page.table(("", ""), [(key, recorded[key]) for key in keys])
    yield html_page.heading("Made by")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    yield html_page.preformatted(f"{content['command']}\n{content['time']}\n{versions}")


def _summary(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for what, evaluation in run.evaluations.items():
            low, high = evaluation.interval
            rows.append(
                (run.name, what, evaluation.main, _percent(evaluation.scores[evaluation.main]),
                 f"{_percent(low)} to {_percent(high)}", len(run.tested.files), run.tested.where)
            )  # fmt: skip
    header = ("run", "what", "score", "%", f"{LEVEL:.0%} interval", "images", "data")
    return html_page.table(header, rows)


def _compared(result: Mapping[str, Any]) -> tuple[str, str, str, str]:
    names = f"{result['second']} to {result['first']}"
    if "missing" in result:
        return names, "", "", result["missing"]
    clear = "clear" if result["is_clear"] else "may be chance"
    return (f"{names}, {result['what']} {result['score']}", f"{100 * result['difference']:+.2f}",
            f"{100 * result['low']:+.2f} to {100 * result['high']:+.2f}", clear)  # fmt: skip


def _percent(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and value == value
    return f"{100 * value:.2f}" if is_number else "-"


def _evaluation(evaluation: Evaluation) -> Iterator[str]:
    rows = [
        (name, f"{value:.3f}" if name == "best threshold" and value else _percent(value))
        for name, value in evaluation.scores.items()
    ]
    yield html_page.table(("score", "%"), rows)
    header = tuple(evaluation.per_class[0])
    yield html_page.table(
        header, [tuple(_cell(key, row[key]) for key in header) for row in evaluation.per_class]
    )
    if evaluation.curves:
        yield html_page.line_chart(
            "Precision and recall at an IoU of 0.5", evaluation.curves, "recall", "precision"
        )
    errors = evaluation.more.get("errors", {})
    if "missing" in errors:
        yield html_page.paragraph(errors["missing"])
    elif errors:
        lost = {
            _ERRORS.get(name, name): 100 * value for name, value in errors["delta_ap50"].items()
        }
        lost = {name: round(value, 3) for name, value in lost.items()}
        yield html_page.bar_chart("AP50 that each kind of error costs (TIDE), in points", lost)
    if evaluation.calibration:
        points = [(b["confidence"], b["accuracy"]) for b in evaluation.calibration]
        yield html_page.line_chart(
            f"Calibration; expected error {_percent(expected_error(evaluation.calibration))} %",
            {"share of right answers": points}, "confidence", "right", diagonal=True,
        )  # fmt: skip
    yield html_page.heading("Confusion: rows are the truth", 3)
    threshold = evaluation.more.get("confusion_threshold")
    if threshold is not None:
        yield html_page.paragraph(f"Detections with a score of {threshold:.3f} or more, IoU 0.5.")
    yield _confusion(evaluation)


_ERRORS = {
    "Cls": "another class", "Loc": "wrong place", "Both": "class and place", "Dupe": "found twice",
    "Bkg": "background", "Miss": "missed", "FP": "all false ones", "FN": "all missed ones",
}  # fmt: skip


def _cell(key: str, value: Any) -> str:
    if key in ("name", "objects", "pixels", "images"):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.3f}" if key == "threshold" else _percent(value)


def _confusion(evaluation: Evaluation) -> str:
    matrix, names = evaluation.confusion, evaluation.columns
    if len(names) <= _MOST_CLASSES:
        return html_page.heat_table(names, matrix.tolist())
    wrong = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    chosen = sorted(np.argsort(-wrong, kind="stable")[:_MOST_CLASSES].tolist())
    part = matrix[np.ix_(chosen, chosen)]
    return html_page.paragraph(
        f"The {_MOST_CLASSES} classes that are confused most often:"
    ) + html_page.heat_table([names[k] for k in chosen], part.tolist())


def _drawings(run: Run, evaluation: Evaluation) -> Iterator[str]:
    for title, listed in (
        ("Worst images", evaluation.worst),
        ("What may be errors of the labels", evaluation.suspects),
    ):
        yield html_page.heading(title, 3)
        if not listed:
            yield html_page.paragraph("None.")
        elif evaluation.task == "detection":
            yield html_page.paragraph("Green is the truth, orange the prediction.")
        elif evaluation.task == "segmentation":
            yield html_page.paragraph("Image, truth, prediction.")
        for position, why in listed[:_DRAWN]:
            image = _draw(run, evaluation, position)
            factor = min(1.0, _SIDE_PX / max(image.shape[0], 1))
            size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            caption = f"{run.tested.files[position].name}: {why}"
            yield html_page.figure(encode_image(small, ".jpg"), caption)


def _draw(run: Run, evaluation: Evaluation, position: int) -> np.ndarray:
    model = run.predictor.model
    image = run.tested.read(position, model.num_channels, model.value_range)
    shown = np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else image.repeat(3, 2))
    if evaluation.task == "classification":
        return shown
    if evaluation.task == "segmentation":
        truth = run.tested.label(position, model.num_channels, model.value_range)
        palette = distinct_colors(len(run.predictor.names))
        return np.hstack([shown, paint(truth, palette), paint(model(image).label, palette)])
    threshold = evaluation.more["confusion_threshold"]
    result = model(image)
    scale = enlargement(shown)
    shown = np.ascontiguousarray(enlarge(shown))
    thickness = max(1, round(max(shown.shape) / 300))
    for box, score, k in zip(result.boxes, result.scores, result.classes, strict=True):
        if score >= threshold:
            _box(shown, scale * box, f"{result.names[k]} {score:.2f}", _PREDICTION, thickness)
    names = {c["id"]: c["name"] for c in run.tested.truth["categories"]}
    for a in run.tested.truth["annotations"]:
        if a["image_id"] == position + 1:
            x, y, w, h = a["bbox"]
            corners = scale * np.array([x, y, x + w, y + h])
            _box(shown, corners, names[a["category_id"]], _TRUTH, thickness)
    return shown


def _box(
    image: np.ndarray, box: Any, text: str, color: tuple[int, int, int], thickness: int
) -> None:
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    cv2.rectangle(image, (x1, y1), (x2, y2), color, thickness)
    place = (x1, y1 - 3 if y1 > 10 else y2 + 10)
    cv2.putText(
        image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.35 * thickness, color, 1, cv2.LINE_AA
    )
