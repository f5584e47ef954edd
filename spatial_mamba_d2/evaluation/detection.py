"""Detection: COCO's scores by pycocotools, and what its matches say besides."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_mamba_d2.evaluation.evaluation import Evaluation, bootstrap, calibrate
from spatial_mamba_d2.evaluation.matching import Matching, find_suspects, match_boxes

STATS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
         "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large")  # fmt: skip
# Images by their number of objects: the lowest and highest number of each group
GROUPS = ((1, 1), (2, 5), (6, 20), (21, 10**9))
_LISTED = 16
_CURVES = 6  # classes, the ones with the most objects


class _Matches(NamedTuple):
    """Detections of one class, the highest scores first.

    Attributes:
        image: int[D], positions.
        score: float[D].
        hit, ignored: bool[10, D], for each IoU threshold.
        num_objects: int[N], of each image.
    """

    image: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    num_objects: np.ndarray


def evaluate_detections(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: str = "bbox"
) -> Evaluation:
    """Evaluate objects in images.

    Args:
        truth: content of a COCO file, without faults, see :func:`~spatial_mamba_d2.data.coco`.
        detections: COCO's results: ``image_id``, ``category_id``, ``bbox`` and ``score``, and
            ``segmentation`` for masks.
        kind: ``bbox`` or ``segm``, by what overlaps are measured.

    Raises:
        ImportError: pycocotools is not installed.
        ValueError: there are no images or objects.
    """
    if not truth["images"] or not truth["annotations"]:
        raise ValueError("truth must have images and annotations to evaluate against, got none")
    run = _run_pycocotools(truth, detections, kind)
    stats = [float(value) if value >= 0 else None for value in run.stats]
    classes = sorted(truth["categories"], key=lambda c: c["id"])
    names = [c["name"] for c in classes]
    image_ids = [int(id_) for id_ in run.params.imgIds]
    matches = _matches_of(run, len(classes), image_ids)
    num_of_image = np.sum([m.num_objects for m in matches], axis=0)
    scores: dict[str, float | None] = dict(zip(STATS, stats, strict=True))
    for low, high in GROUPS:
        chosen = ((num_of_image >= low) & (num_of_image <= high)).astype(np.int64)
        if chosen.any():
            text = (
                f"{low}"
                if low == high
                else f"{low} to {high}"
                if high < 10**9
                else f"{low} or more"
            )
            scores[f"AP, images with {text} objects"] = average_precision(matches, chosen)
    threshold, best = _best_threshold(matches)
    scores |= {"best threshold": threshold, "precision": best[0], "recall": best[1], "F1": best[2]}
    matching = match_boxes(
        truth, detections, image_ids, [c["id"] for c in classes], kind, threshold
    )
    errors = _hotcoco_errors(truth, detections, kind)
    worst = _worst(matching)
    return Evaluation(
        "detection",
        "AP",
        scores,
        bootstrap(len(image_ids), lambda weights: average_precision(matches, weights)),
        _rows(run, matches, names),
        matching.confusion,
        [*names, "background"],
        curves=_curves(run, matches, names),
        calibration=calibrate(
            np.concatenate([m.score[~m.ignored[0]] for m in matches]),
            np.concatenate([m.hit[0][~m.ignored[0]] for m in matches]),
        ),
        more={"overlap": kind, "image_ids": image_ids, "errors": errors,
              "confusion_threshold": threshold},
        worst=worst,
        suspects=find_suspects(matching, names)[:_LISTED],
    )  # fmt: skip


def _run_pycocotools(truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: str) -> Any:
    try:
        annotations = importlib.import_module("pycocotools.coco").COCO
        evaluation = importlib.import_module("pycocotools.cocoeval").COCOeval
    except ImportError as error:
        raise ImportError(
            f"reports on detection need pycocotools: pip install spatial-mamba-d2[evaluation] "
            f"({error})"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):
        objects = annotations()
        objects.dataset = {"info": {}, **copy.deepcopy(truth)}
        objects.createIndex()
        found = copy.deepcopy(list(detections))
        if kind == "segm":  # with a box, pycocotools would take its area for that of the mask
            found = [{k: v for k, v in d.items() if k != "bbox"} for d in found]
        results = objects.loadRes(found) if found else annotations()
        if not found:
            results.dataset = {**objects.dataset, "annotations": []}
            results.createIndex()
        run = evaluation(objects, results, kind)
        run.params.catIds = sorted(objects.getCatIds())
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def _matches_of(run: Any, num_classes: int, image_ids: Sequence[int]) -> list[_Matches]:
    """From what pycocotools has matched, for objects of all sizes."""
    num_areas, num_images = len(run.params.areaRng), len(image_ids)
    num_thresholds = len(run.params.iouThrs)
    matches = []
    for k in range(num_classes):
        first = k * num_areas * num_images
        images, scores, hits, ignored = [], [], [], []
        num_objects = np.zeros(num_images, np.int64)
        for position in range(num_images):
            found = run.evalImgs[first + position]
            if found is None:
                continue
            num_objects[position] = np.count_nonzero(np.asarray(found["gtIgnore"]) == 0)
            number = len(found["dtScores"])
            images.append(np.full(number, position))
            scores.append(np.asarray(found["dtScores"], np.float64))
            hits.append(np.asarray(found["dtMatches"]).reshape(num_thresholds, -1) > 0)
            ignored.append(np.asarray(found["dtIgnore"]).reshape(num_thresholds, -1) > 0)
        if not images:
            empty = np.zeros((num_thresholds, 0), bool)
            matches.append(_Matches(np.zeros(0, int), np.zeros(0), empty, empty, num_objects))
            continue
        score = np.concatenate(scores)
        order = np.argsort(-score, kind="mergesort")
        matches.append(
            _Matches(
                np.concatenate(images)[order],
                score[order],
                np.concatenate(hits, axis=1)[:, order],
                np.concatenate(ignored, axis=1)[:, order],
                num_objects,
            )
        )
    return matches


_RECALLS = np.linspace(0, 1, 101)


def average_precision(matches: Sequence[_Matches], weights: np.ndarray) -> float:
    """COCO's AP over images that count ``weights`` times, int[N]; NaN without objects.

    With weights of 0 and 1 it is what pycocotools computes for those images alone.
    """
    values = []
    for m in matches:
        total = int((m.num_objects * weights).sum())
        if not total:
            continue
        values.append(np.zeros(len(m.hit)))
        if not len(m.score):
            continue
        weight = weights[m.image] * ~m.ignored  # [10, D]
        hits, number = np.cumsum(m.hit * weight, axis=1), np.cumsum(weight, axis=1)
        precision = hits / np.maximum(number, 1)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # The first detection with each recall, in one search: rows are told apart by an offset.
        needed = np.searchsorted(np.arange(total + 1) / total, _RECALLS)
        offset = np.arange(len(hits))[:, None] * (total + 1)
        places = np.searchsorted((hits + offset).ravel(), (needed + offset).ravel())
        places = places.reshape(len(hits), -1) - np.arange(len(hits))[:, None] * len(m.score)
        reached = places < len(m.score)
        found = np.take_along_axis(envelope, np.where(reached, places, 0), axis=1)
        values[-1] = (found * reached).mean(axis=1)
    return float(np.mean(values)) if values else float("nan")


def _best(hit: np.ndarray, score: np.ndarray, total: int) -> tuple[float, tuple[float, ...]]:
    """The threshold of the highest F1, and precision, recall and F1 there.

    Args:
        hit, score: bool[D] and float[D], the highest scores first.
    """
    if not len(score) or not total:
        return 0.5, (float("nan"), 0.0, 0.0)
    hits, number = np.cumsum(hit), np.arange(1, len(score) + 1)
    f1 = 2 * hits / (number + total)
    f1[:-1][score[:-1] == score[1:]] = -1  # a threshold does not part equal scores
    best = int(f1.argmax())
    precision, recall = hits[best] / number[best], hits[best] / total
    return float(score[best]), (float(precision), float(recall), float(f1[best]))


def _best_threshold(matches: Sequence[_Matches]) -> tuple[float, tuple[float, ...]]:
    """Of all classes together, at an IoU of 0.5."""
    hit = np.concatenate([m.hit[0][~m.ignored[0]] for m in matches])
    score = np.concatenate([m.score[~m.ignored[0]] for m in matches])
    order = np.argsort(-score, kind="stable")
    return _best(hit[order], score[order], sum(int(m.num_objects.sum()) for m in matches))


def _rows(run: Any, matches: Sequence[_Matches], names: Sequence[str]) -> list[dict[str, Any]]:
    precision = run.eval["precision"]  # [10, 101, K, 4 areas, 3 limits]

    def mean(values: np.ndarray) -> float:
        valid = values[values > -1]
        return float(valid.mean()) if valid.size else float("nan")

    rows = []
    for k, (name, m) in enumerate(zip(names, matches, strict=True)):
        counted = ~m.ignored[0]
        threshold, best = _best(m.hit[0][counted], m.score[counted], int(m.num_objects.sum()))
        rows.append(
            {
                "name": name,
                "objects": int(m.num_objects.sum()),
                "AP": mean(precision[:, :, k, 0, -1]),
                "AP50": mean(precision[0, :, k, 0, -1]),
                "AP small": mean(precision[:, :, k, 1, -1]),
                "AP medium": mean(precision[:, :, k, 2, -1]),
                "AP large": mean(precision[:, :, k, 3, -1]),
                "threshold": threshold,
                "precision": best[0],
                "recall": best[1],
                "F1": best[2],
            }
        )
    return rows


def _curves(
    run: Any, matches: Sequence[_Matches], names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """Precision at 101 recalls and an IoU of 0.5, of all classes and the most frequent ones."""
    precision = run.eval["precision"][0, :, :, 0, -1]  # [101, K]
    usual = sorted(range(len(names)), key=lambda k: -int(matches[k].num_objects.sum()))
    valid = [k for k in range(len(names)) if (precision[:, k] > -1).all()]
    curves = {}
    if valid:
        mean = precision[:, valid].mean(axis=1)
        curves["all classes"] = list(zip(_RECALLS.tolist(), mean.tolist(), strict=True))
    for k in [k for k in usual if k in valid][:_CURVES]:
        points = zip(_RECALLS.tolist(), precision[:, k].tolist(), strict=True)
        curves[names[k]] = list(points)
    return curves


def _worst(matching: Matching) -> list[tuple[int, str]]:
    """Images with the lowest F1 first; of equal ones, those with more errors."""
    order = sorted(
        range(len(matching.images)),
        key=lambda i: (matching.images[i].f1, -matching.images[i].num_errors),
    )
    listed = []
    for i in order:
        image = matching.images[i]
        if image.num_errors:
            listed.append(
                (i, f"{image.num_right} right, {image.num_wrong} wrong, {image.num_missed} missed")
            )
    return listed[:_LISTED]


def _hotcoco_errors(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: str
) -> dict[str, Any]:
    """What each kind of error costs, by TIDE as hotcoco computes it; a reason if it cannot."""
    try:
        hotcoco = importlib.import_module("hotcoco")
    except ImportError:
        return {"missing": "kinds of errors need hotcoco: pip install spatial-mamba-d2[evaluation]"}
    if not detections:
        return {"missing": "there are no detections"}
    objects = hotcoco.COCO({"info": {}, "licenses": [], **copy.deepcopy(truth)})
    run = hotcoco.COCOeval(objects, objects.load_res(copy.deepcopy(list(detections))), kind)
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accumulate()
    found = run.tide_errors()
    return {"delta_ap50": dict(found["delta_ap"]), "counts": dict(found["counts"]),
            "ap50": float(found["ap_base"])}  # fmt: skip
