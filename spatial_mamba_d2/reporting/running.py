"""``report``: predicts the test images of runs, evaluates, compares, and writes page and JSON."""

from __future__ import annotations

import datetime
import json
import logging
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from spatial_mamba_d2 import __version__
from spatial_mamba_d2.data.formats import read_data, split_data
from spatial_mamba_d2.data.outputs import check_outputs
from spatial_mamba_d2.evaluation import (
    Evaluation,
    LabelMapScores,
    compare,
    evaluate_classes,
    evaluate_detections,
)
from spatial_mamba_d2.models.checkpoints.reading import file_sha256, read_checkpoint
from spatial_mamba_d2.prediction import load_predictor
from spatial_mamba_d2.prediction.predictor import Predictor, SemanticPredictor
from spatial_mamba_d2.reporting.evaluated_run import Run
from spatial_mamba_d2.reporting.report_page import write_page
from spatial_mamba_d2.reporting.test_sets import (
    TestSet,
    load_configuration,
    of_configuration,
    of_data,
)
from spatial_mamba_d2.system.atomic import replacing
from spatial_mamba_d2.system.missing import no_such

logger = logging.getLogger(__name__)

# Of a run's folder, the first that there is
CHECKPOINTS = ("model_best.pth", "best.ckpt", "model_final.pth", "last.ckpt")


def report(
    runs: Sequence[str | Path],
    *,
    data: str | Path | None = None,
    html: str | Path | None = None,
    json_file: str | Path | None = None,
    device: str | None = None,
    max_images: int | None = None,
) -> dict[str, Any]:
    """Evaluate checkpoints on their test data, or on ``data``, and compare them.

    Args:
        runs: folders of trainings, whose best checkpoint counts, or checkpoints.
        data: in any format that is recognised; None: the test set of each run's configuration.
        html, json_file: files to write.
        device: see :func:`~spatial_mamba_d2.prediction.load_predictor`.
        max_images: only the first ones; the report says so.

    Returns:
        the content of ``json_file``.

    Raises:
        FileNotFoundError, ValueError: a run, its configuration or the data are not usable.
        ImportError: a package that the evaluation needs is missing.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images must be at least 1, got {max_images}")
    outputs = [Path(path) for path in (html, json_file) if path is not None]
    checkpoints = [find_checkpoint(run) for run in runs]
    check_outputs(outputs, checkpoints, overwrite=True)
    names = _names(runs)
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        found = [
            _evaluate(name, weights, data, device, max_images, Path(folder))
            for name, weights in zip(names, checkpoints, strict=True)
        ]
        content = _content(found, max_images)
        if html is not None:
            write_page(Path(html), found, content)
    if json_file is not None:
        path = Path(json_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return content


def find_checkpoint(run: str | Path) -> Path:
    """The checkpoint of a run: itself, or the best one in its folder."""
    run = Path(run)
    if run.is_file():
        return run
    if not run.is_dir():
        raise no_such("run", run, "file or folder")
    for name in CHECKPOINTS:
        if (run / name).is_file():
            return run / name
    raise ValueError(f"run: {run} has no checkpoint, which is one of {', '.join(CHECKPOINTS)}")


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The runs' last parts, or their paths if these are not distinct."""
    short = [Path(run).name or str(run) for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _evaluate(
    name: str,
    weights: Path,
    data: str | Path | None,
    device: str | None,
    max_images: int | None,
    folder: Path,
) -> Run:
    predictor = load_predictor(weights, device=device)
    task = predictor.task
    names = predictor.names
    if task == "classification":
        names = tuple(predictor.model.predictor.classes)  # type: ignore[attr-defined]
    if data is not None:
        labelled = read_data(data, task=task, extract_to=folder / "images")
        if "val" not in labelled.splits and "test" not in labelled.splits:
            labelled = split_data(labelled) if "train" in labelled.splits else labelled
        tested = of_data(labelled, names, folder / name.replace("/", "_"))
    else:
        beside = weights.with_name("config.yaml")
        text = read_checkpoint(weights).get("config")
        cfg = load_configuration(task, beside if beside.is_file() else None, text)
        tested = of_configuration(task, cfg, names)
    if max_images is not None:
        tested = _first(tested, max_images)
    logger.info("%s: %d images of %s", name, len(tested.files), tested.where)
    evaluate = {"detection": _detect, "segmentation": _segment, "classification": _classify}[task]
    evaluations = evaluate(predictor, tested, names)
    for what, evaluation in evaluations.items():
        low, high = evaluation.interval
        value = evaluation.scores[evaluation.main] or 0.0
        logger.info("%s: %s %s %.4f (%.4f to %.4f)", name, what, evaluation.main, value, low, high)
    return Run(name, weights, predictor, tested, _protocol(predictor, max_images), evaluations)


def _first(tested: TestSet, number: int) -> TestSet:
    truth = tested.truth
    if isinstance(truth, dict):
        images = truth["images"][:number]
        kept = {image["id"] for image in images}
        annotations = [a for a in truth["annotations"] if a["image_id"] in kept]
        truth = {**truth, "images": images, "annotations": annotations}
    else:
        truth = truth[:number]
    return TestSet(tested.files[:number], truth, tested.where, tested.labels)


def _images(predictor: Predictor, tested: TestSet) -> Iterator[tuple[int, np.ndarray]]:
    model = predictor.model
    for position in range(len(tested.files)):
        yield position, tested.read(position, model.num_channels, model.value_range)
        if (position + 1) % 100 == 0:
            logger.info("%d of %d images", position + 1, len(tested.files))


def _detect(predictor: Predictor, tested: TestSet, names: Sequence[str]) -> dict[str, Evaluation]:
    found: list[dict[str, Any]] = []
    for position, image in _images(predictor, tested):
        found += predictor.model(image).to_coco(position + 1)
    evaluations = {"boxes": evaluate_detections(tested.truth, found, "bbox")}
    with_masks = all(a.get("segmentation") for a in tested.truth["annotations"])
    if getattr(predictor.model, "has_masks", False) and with_masks:
        evaluations["masks"] = evaluate_detections(tested.truth, found, "segm")
    for evaluation in evaluations.values():
        evaluation.more["detections"] = len(found)
    return evaluations


def _segment(predictor: Predictor, tested: TestSet, names: Sequence[str]) -> dict[str, Evaluation]:
    scores = LabelMapScores(names)
    model = cast(SemanticPredictor, predictor.model)
    for position, image in _images(predictor, tested):
        (probabilities,) = model.probabilities([image])
        truth = tested.label(position, model.num_channels, model.value_range)
        scores.update(probabilities.argmax(axis=0), truth, probabilities.max(axis=0))
    return {"label maps": scores.evaluate()}


def _classify(predictor: Predictor, tested: TestSet, names: Sequence[str]) -> dict[str, Evaluation]:
    probabilities = [predictor.model(image).scores for _, image in _images(predictor, tested)]
    targets = np.array([sample.target for sample in tested.truth])
    return {"classes": evaluate_classes(np.stack(probabilities), targets, names)}


def _protocol(predictor: Predictor, max_images: int | None) -> str:
    text = {
        "detection": "COCO's protocol, at most 100 detections for an image; one scale, no flips",
        "segmentation": "the run's protocol of evaluation; ignored pixels are left out",
        "classification": "one centre crop",
    }[predictor.task]
    return f"{text}; the first {max_images} images only" if max_images is not None else text


def _content(runs: Sequence[Run], max_images: int | None) -> dict[str, Any]:
    prints = [run.tested.fingerprint() for run in runs]
    return {
        "command": " ".join(sys.argv),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"spatial_mamba_d2": __version__, "torch": torch.__version__,
                     "numpy": np.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {platform.system()}",
        "runs": [
            {
                "name": run.name,
                "weights": str(run.weights),
                "sha256": file_sha256(run.weights),
                "data": run.tested.where,
                "num_images": len(run.tested.files),
                "data_fingerprint": fingerprint,
                "protocol": run.protocol,
                "evaluations": {
                    what: evaluation.as_json([str(file) for file in run.tested.files])
                    for what, evaluation in run.evaluations.items()
                },
            }
            for run, fingerprint in zip(runs, prints, strict=True)
        ],
        "comparisons": _comparisons(runs, prints),
    }  # fmt: skip


def _comparisons(runs: Sequence[Run], prints: Sequence[str]) -> list[dict[str, Any]]:
    """Of each two runs on the same data."""
    found = []
    for i, first in enumerate(runs):
        for j in range(i + 1, len(runs)):
            second = runs[j]
            both = {"first": first.name, "second": second.name}
            if prints[i] != prints[j]:
                found.append({**both, "missing": "the data differ"})
                continue
            for what in first.evaluations.keys() & second.evaluations.keys():
                result = compare(first.evaluations[what], second.evaluations[what])
                found.append({**both, "what": what, **result})
    return found
