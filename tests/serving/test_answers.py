"""Parameters and answers."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_d2.prediction.masks import crop_of_rle, paint_crops
from spatial_mamba_d2.serving.answers import (
    ParameterError,
    as_json,
    parameters_of,
    parse_parameters,
)
from spatial_mamba_d2.serving.openapi import REFUSALS, answer_schema, openapi_document
from tests.serving.conftest import as_label

TASKS = ("detection", "segmentation", "classification")


def conforms(value, schema) -> bool:
    """The part of JSON Schema that our document uses."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema["type"]]) or value not in schema.get("enum", [value]):
        return False
    if isinstance(value, list):
        return all(conforms(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        known = schema["properties"]
        required = set(schema["required"])
        return required <= value.keys() <= known.keys() and all(
            conforms(item, known[name]) for name, item in value.items()
        )
    return True


def answer(predictor, truth, task, *words):
    values = parse_parameters(task, words)
    thresh = values.get("score_thresh", 0.5)
    return as_json(predictor(task)(truth.image, score_thresh=thresh), values)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_as_the_document_says(task, predictor, truth):
    choices = [
        (name, choice)
        for name, parameter in parameters_of(task).items()
        for choice in parameter.choices or ()
    ]
    for words in [[], *([word] for word in choices)]:
        found = json.loads(json.dumps(answer(predictor, truth, task, *words)))
        assert conforms(found, answer_schema(task)), words
        assert (found["height"], found["width"]) == truth.image.shape[:2]


def test_masks_come_in_each_form(predictor, truth):
    objects = {
        form: answer(predictor, truth, "detection", ("masks", form))["objects"]
        for form in ("rle", "polygons", "none")
    }
    size = truth.image.shape[:2]
    numbers = np.unique(truth.numbers[truth.numbers > 0])
    assert [len(found) for found in objects.values()] == [len(numbers)] * 3
    for i, number in enumerate(numbers):
        mask = truth.numbers == number
        (painted,) = paint_crops([crop_of_rle(objects["rle"][i]["rle"])], size)
        assert (painted == mask).all()
        rings = [np.array(ring) for part in objects["polygons"][i]["polygons"] for ring in part]
        x, y = (np.concatenate([ring[:, axis] for ring in rings]) for axis in (0, 1))
        assert objects["none"][i]["box"] == [x.min(), y.min(), x.max(), y.max()]
        assert objects["none"][i]["area"] == mask.sum()
        assert not {"rle", "polygons"} & objects["none"][i].keys()


def test_a_detector_without_masks_has_boxes(predictor, truth):
    result = predictor("detection", with_masks=False)(truth.image)
    plain = as_json(result, {"masks": "rle"})["objects"][0]
    assert "rle" not in plain
    (((*corners, last),),) = as_json(result, {"masks": "polygons"})["objects"][0]["polygons"]
    x1, y1, x2, y2 = plain["box"]
    assert corners[0] == last == [x1, y1] and corners[2] == [x2, y2]


def test_label_maps_come_in_each_form(predictor, truth):
    label = as_label(truth)
    found = answer(predictor, truth, "segmentation")
    with io.BytesIO(base64.b64decode(found["png"])) as file, Image.open(file) as image:
        assert (np.asarray(image) == label).all()
    assert {c["class"]: c["pixels"] for c in found["classes"]} == dict(
        zip(*(v.tolist() for v in np.unique(label, return_counts=True)), strict=True)
    )
    for item in answer(predictor, truth, "segmentation", ("labels", "rle"))["classes"]:
        (painted,) = paint_crops([crop_of_rle(item["rle"])], label.shape)
        assert (painted == (label == item["class"])).all()


def test_classes_are_ranked(predictor, truth):
    (first, second) = answer(predictor, truth, "classification", ("top", "2"))["classes"]
    assert first["score"] >= second["score"] and first["name"] != second["name"]


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("detection", [("scores", "1")], "parameters of detection are score_thresh, .*'scores'"),
        ("classification", [("window_px", "64")], "parameters of classification are top, got"),
        ("detection", [("score_thresh", "1.5")], r"score_thresh must be in \[0, 1\], got 1.5"),
        ("detection", [("score_thresh", "nan")], r"score_thresh must be in \[0, 1\], got nan"),
        ("detection", [("score_thresh", "high")], "score_thresh must be a number, got 'high'"),
        ("detection", [("masks", "png")], "masks must be one of rle, polygons, none, got 'png'"),
        ("detection", [("masks", "rle"), ("masks", "none")], "masks must be given once"),
        ("segmentation", [("overlap_px", "8")], "overlap_px needs window_px"),
        ("segmentation", [("window_px", "3")], r"window_px must be in \[4, 65536\], got 3"),
        ("segmentation", [("window_px", "64"), ("overlap_px", "33")], "overlap_px .* must be in"),
        ("classification", [("top", "0")], r"top must be in \[1, 1000\]"),
        ("classification", [("top", "1e3")], "top must be a integer, got '1e3'"),
    ],
)
def test_a_wrong_parameter_is_named(task, words, message):
    with pytest.raises(ParameterError, match=message):
        parse_parameters(task, words)


@pytest.mark.parametrize("task", TASKS)
def test_the_document_is_complete(task):
    document = openapi_document(task)
    operation = document["paths"]["/predict"]["post"]
    names = [p["name"] for p in operation["parameters"]]
    assert names == list(parse_parameters(task, []))
    assert set(operation["responses"]) == {"200", *map(str, REFUSALS)}
    assert re.fullmatch(r"3\.1\.\d", document["openapi"]) and document["info"]["version"]
    json.dumps(document, allow_nan=False)
