"""What a request may ask for, and its answer: what checks, JSON and OpenAPI have in common.

Coordinates are pixels of the upright image, (0, 0) its upper left corner, as in
:class:`~spatial_mamba_d2.prediction.Detections`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spatial_mamba_d2.data.images import encode_image
from spatial_mamba_d2.prediction.predictor import SCORE_THRESH, check_arguments
from spatial_mamba_d2.prediction.results import ClassScores, Detections, LabelMap, Result
from spatial_mamba_d2.prediction.writers import outlines


class ParameterError(ValueError):
    """A query parameter that cannot be used."""


@dataclass(frozen=True)
class Parameter:
    """A query parameter.

    Attributes:
        default: its value if it is not given; its type is that of the values.
        tasks: in which it has a meaning.
        text: what it sets.
        choices: the values that it may have; None: any of ``kind``.
        kind: ``number``, ``integer`` or ``string``.
        limits: lowest and highest value of numbers.
    """

    default: Any
    tasks: tuple[str, ...]
    text: str
    kind: str
    choices: tuple[str, ...] | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)

    def parse(self, name: str, text: str) -> Any:
        """Raises ParameterError if ``text`` is no valid value."""
        if self.choices is not None:
            if text not in self.choices:
                raise ParameterError(
                    f"{name} must be one of {', '.join(self.choices)}, got {text!r}"
                )
            return text
        try:
            value = float(text) if self.kind == "number" else int(text)
        except ValueError:
            raise ParameterError(f"{name} must be a {self.kind}, got {text[:40]!r}") from None
        low, high = self.limits
        if not low <= value <= high:
            raise ParameterError(f"{name} must be in [{low:g}, {high:g}], got {text[:40]}")
        return value

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the values."""
        schema: dict[str, Any] = {"type": self.kind}
        if self.choices is not None:
            schema["enum"] = list(self.choices)
        for word, value in zip(("minimum", "maximum"), self.limits, strict=True):
            if math.isfinite(value):
                schema[word] = value
        if self.default is not None:
            schema["default"] = self.default
        return schema


PARAMETERS = {
    "score_thresh": Parameter(
        SCORE_THRESH, ("detection",), "lowest score of objects", "number", limits=(0, 1)
    ),
    "masks": Parameter(
        "rle",
        ("detection",),
        "form of masks: COCO's RLE; polygons along the edges of pixels, each an outline and its "
        "holes, of the box if the model has no masks; or none",
        "string",
        ("rle", "polygons", "none"),
    ),
    "labels": Parameter(
        "png",
        ("segmentation",),
        "form of the label map: a grey PNG of class indices in base64, 255 where nothing was "
        "predicted; COCO's RLE of each class; or none",
        "string",
        ("png", "rle", "none"),
    ),
    "top": Parameter(
        5, ("classification",), "how many classes, the most probable first", "integer",
        limits=(1, 1000),
    ),
    "window_px": Parameter(
        None,
        ("detection", "segmentation"),
        "side of the windows by which a larger image is predicted; default: at once",
        "integer",
        limits=(4, 65536),
    ),
    "overlap_px": Parameter(
        None,
        ("detection", "segmentation"),
        "what windows share; default: a quarter of window_px",
        "integer",
        limits=(1, 32768),
    ),
}  # fmt: skip
_OF_PREDICTOR = ("score_thresh", "window_px", "overlap_px")


def parameters_of(task: str) -> dict[str, Parameter]:
    return {name: p for name, p in PARAMETERS.items() if task in p.tasks}


def parse_parameters(task: str, words: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The values of all parameters of a task.

    Args:
        words: names and values in a query.

    Raises:
        ParameterError: a name is unknown or given twice, or a value is out of its range.
    """
    known = parameters_of(task)
    given: dict[str, Any] = {}
    for name, text in words:
        if name not in known:
            raise ParameterError(f"parameters of {task} are {', '.join(known)}, got {name[:40]!r}")
        if name in given:
            raise ParameterError(f"{name} must be given once")
        given[name] = known[name].parse(name, text)
    values = {name: given.get(name, parameter.default) for name, parameter in known.items()}
    thresh = values.get("score_thresh", SCORE_THRESH)
    try:
        check_arguments(task, thresh, values.get("window_px"), values.get("overlap_px"))
    except ValueError as error:
        raise ParameterError(str(error)) from None
    return values


def predictor_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of :meth:`~spatial_mamba_d2.prediction.Predictor.__call__`."""
    return {name: values[name] for name in _OF_PREDICTOR if name in values}


def as_json(result: Result, values: Mapping[str, Any]) -> dict[str, Any]:
    """The answer for a result, with nothing but JSON's types.

    Args:
        values: of :func:`parse_parameters`.
    """
    height, width = result.image_size
    head = {"height": int(height), "width": int(width)}
    if isinstance(result, Detections):
        return {"task": "detection", **head, "objects": _objects(result, values["masks"])}
    if isinstance(result, ClassScores):
        return {"task": "classification", **head, "classes": _ranked(result, values["top"])}
    return {"task": "segmentation", **head, **_regions(result, values["labels"])}


def _objects(result: Detections, form: str) -> list[dict[str, Any]]:
    objects = []
    for index, item in enumerate(result.to_coco()):
        class_index = int(result.classes[index])
        found = {
            "box": result.boxes[index].tolist(),
            "score": item["score"],
            "class": class_index,
            "name": result.names[class_index],
            "area": item["area"],
        }
        if form == "rle" and "segmentation" in item:
            found["rle"] = item["segmentation"]
        elif form == "polygons":
            shapes = outlines(result, index)
            found["polygons"] = [[ring.tolist() for ring in rings] for rings in shapes]
        objects.append(found)
    return objects


def _ranked(result: ClassScores, number: int) -> list[dict[str, Any]]:
    rows = result.rows(number)
    return [{name: row[name] for name in ("class", "name", "score")} for row in rows]


def _regions(result: LabelMap, form: str) -> dict[str, Any]:
    columns = ("class", "name", "pixels", "share")
    classes = [{name: _plain(row[name]) for name in columns} for row in result.rows()]
    if form == "rle":
        for found, item in zip(classes, result.to_coco(), strict=True):  # both by class index
            found["rle"] = item["segmentation"]
    answer: dict[str, Any] = {"classes": classes}
    if form == "png":
        answer["png"] = base64.b64encode(encode_image(result.label, ".png")).decode("ascii")
    return answer


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
