"""The OpenAPI document of the server, for the task of its model."""

from __future__ import annotations

from typing import Any

from spatial_mamba_d2 import __version__
from spatial_mamba_d2.serving.answers import parameters_of

#: status of refused requests -> why
REFUSALS = {
    400: "a parameter or the form is wrong",
    408: "the request did not arrive in time",
    413: "too many bytes, pixels or windows",
    415: "no JPEG, PNG, BMP, WebP or TIFF",
    422: "the image is damaged, or holds what the model cannot take",
    500: "a fault of the server, which its log explains",
    503: "as many requests as allowed are waiting; Retry-After says when to try again",
    504: "no answer in time",
}
_INTEGER, _NUMBER, _TEXT = {"type": "integer"}, {"type": "number"}, {"type": "string"}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_RLE = _object({"size": _array(_INTEGER), "counts": _TEXT})
_NAMED = {"class": _INTEGER, "name": _TEXT}
_RESULTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "detection": (
        {
            "objects": _array(
                _object(
                    {
                        "box": {**_array(_NUMBER), "description": "x1, y1, x2, y2 in pixels"},
                        "score": _NUMBER,
                        **_NAMED,
                        "area": _NUMBER,
                        "rle": _RLE,
                        "polygons": _array(_array(_array(_array(_NUMBER)))),
                    },
                    optional=("rle", "polygons"),
                )
            )
        },
        (),
    ),
    "segmentation": (
        {
            "classes": _array(
                _object({**_NAMED, "pixels": _INTEGER, "share": _NUMBER, "rle": _RLE}, ("rle",))
            ),
            "png": {**_TEXT, "description": "grey PNG of class indices in base64"},
        },
        ("png",),
    ),
    "classification": ({"classes": _array(_object({**_NAMED, "score": _NUMBER}))}, ()),
}


def answer_schema(task: str) -> dict[str, Any]:
    """JSON Schema of an answer."""
    properties, optional = _RESULTS[task]
    head = {"task": {**_TEXT, "enum": [task]}, "height": _INTEGER, "width": _INTEGER}
    return _object({**head, **properties}, optional)


def openapi_document(task: str) -> dict[str, Any]:
    """What clients and generators of clients read at ``/openapi.json``."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": _object({"image": binary["schema"]})}
    error = {"schema": _object({"error": _TEXT})}
    responses: dict[str, Any] = {
        str(code): {"description": text, "content": {"application/json": error}}
        for code, text in REFUSALS.items()
    }
    answer = {"schema": answer_schema(task)}
    responses["200"] = {"description": "prediction", "content": {"application/json": answer}}
    predict = {
        "summary": f"{task.capitalize()} of one image",
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": parameter.text,
                "schema": parameter.schema(),
            }
            for name, parameter in parameters_of(task).items()
        ],
        "requestBody": {
            "required": True,
            "description": "the bytes of an image file, or a form with the file as image",
            "content": {"image/*": binary, "multipart/form-data": form},
        },
        "responses": dict(sorted(responses.items())),
    }
    model = _object({"task": _TEXT, "names": _array(_TEXT), "version": _TEXT})
    return {
        "openapi": "3.1.0",
        "info": {"title": "spatial_mamba_d2", "version": __version__},
        "paths": {
            "/predict": {"post": predict},
            "/model": {"get": _get("Task and names of classes", "application/json", model)},
            "/healthz": {"get": _get("Whether it takes requests", "text/plain", _TEXT)},
            "/metrics": {"get": _get("Prometheus's text format", "text/plain", _TEXT)},
        },
    }


def _get(summary: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    content = {kind: {"schema": schema}}
    return {"summary": summary, "responses": {"200": {"description": "OK", "content": content}}}
