"""COCO's scores of boxes, masks and keypoints, by one of three packages: ``TEST.EVALUATOR``."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets, instances_to_coco_json
from pycocotools.cocoeval import Params

from spatial_mamba_d2.detection.mask_rle import RleMasks

logger = logging.getLogger(__name__)


class Package(NamedTuple):
    """Where a package has its classes of annotations and of the evaluation."""

    module: str
    annotations: str
    evaluation_module: str
    evaluation: str


# pycocotools is COCO's own code, and the measure of the others.
PACKAGES = {
    "pycocotools": Package("pycocotools.coco", "COCO", "pycocotools.cocoeval", "COCOeval"),
    "hotcoco": Package("hotcoco", "COCO", "hotcoco", "COCOeval"),
    "faster_coco_eval": Package("faster_coco_eval", "COCO", "faster_coco_eval", "COCOeval_faster"),
}


def check_installed(evaluator: str) -> None:
    """Raises ValueError if the package of ``TEST.EVALUATOR`` is not installed."""
    try:
        importlib.import_module(PACKAGES[evaluator].module)
    except ImportError as error:
        raise ValueError(
            f"TEST.EVALUATOR {evaluator} needs its package ({error}): "
            f"pip install 'spatial-mamba-d2[evaluation]', or TEST.EVALUATOR pycocotools"
        ) from None


def evaluate_coco(
    json_file: str,
    detections: list[dict[str, Any]],
    task: str,
    *,
    evaluator: str = "pycocotools",
    max_detections: int = 100,
    sigmas: Sequence[float] = (),
) -> SimpleNamespace:
    """Evaluate detections against a file in COCO's format.

    Args:
        json_file: the ground truth.
        detections: in COCO's format of results, at least one.
        task: ``bbox``, ``segm`` or ``keypoints``.
        evaluator: a key of :data:`PACKAGES`, whose results are the same.
        max_detections: highest number for an image, of boxes and masks; those of the highest
            scores count.
        sigmas: tolerances of the keypoints; none: COCO's 17.

    Returns:
        ``stats``: COCO's 12 numbers (10 for keypoints), -1 where there are no objects;
        ``eval["precision"]``: float64 ``[10 IoU, 101 recall, classes, areas, numbers]``, and
        ``eval["recall"]``; ``summary``: the numbers as text.

    Raises:
        ValueError: the package is not installed.
    """
    check_installed(evaluator)
    package = PACKAGES[evaluator]
    annotations = getattr(importlib.import_module(package.module), package.annotations)
    evaluation = getattr(importlib.import_module(package.evaluation_module), package.evaluation)
    if task == "segm":
        # With a box, COCO's code would take its area for that of the mask.
        detections = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    params = Params(task)
    if task != "keypoints":
        params.maxDets = [1, min(10, max_detections), max_detections]  # ascending, as pycocotools
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):  # steps and times
        truth = annotations(json_file)
        run = evaluation(truth, truth.loadRes(detections), task)
        run.params.maxDets = params.maxDets
        run.params.catIds = sorted(truth.getCatIds())  # also those without objects
        if len(sigmas):
            run.params.kpt_oks_sigmas = np.asarray(sigmas, float)
        run.evaluate()
        run.accumulate()
    # One summary for all, because that of pycocotools knows no other limit than 100.
    arrays = {key: np.asarray(run.eval[key]) for key in ("precision", "recall")}
    summary = COCOevalMaxDets()
    summary.params, summary.eval = params, arrays
    with contextlib.redirect_stdout(printed):
        summary.summarize()
    return SimpleNamespace(stats=summary.stats, eval=arrays, summary=printed.getvalue())


def recall_at_50(found: SimpleNamespace | None) -> float:
    """Percent of the objects that were found with IoU 0.5, mean over the classes; NaN: no objects.

    Args:
        found: of :func:`evaluate_coco`; None: nothing was detected.
    """
    if found is None:
        return 0.0
    of_classes = found.eval["recall"][0, :, 0, -1]  # all sizes, the highest number
    of_classes = of_classes[of_classes >= 0]
    return float(of_classes.mean() * 100) if len(of_classes) else float("nan")


class CocoEvaluator(COCOEvaluator):
    """Detectron2's evaluator, with a choice of the package that computes the scores.

    Args:
        dataset_name: its metadata has ``json_file``, in COCO's format.
        tasks: some of ``bbox segm keypoints``.
        output_dir: where predictions are written.
        evaluator: see :func:`evaluate_coco`.
        max_detections: highest number for an image.
        sigmas: tolerances of the keypoints.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str],
        output_dir: str | Path,
        *,
        evaluator: str = "pycocotools",
        max_detections: int = 100,
        sigmas: Sequence[float] = (),
    ):
        check_installed(evaluator)
        super().__init__(
            dataset_name,
            tuple(tasks),
            output_dir=str(output_dir),
            max_dets_per_image=max_detections,
            kpt_oks_sigmas=sigmas,
            use_fast_impl=False,
        )
        self.evaluator, self.max_detections = evaluator, max_detections

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the detections of images; masks may be tensors or ``RleMasks``."""
        for item, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            masks = instances.get("pred_masks") if instances.has("pred_masks") else None
            if isinstance(masks, RleMasks):
                instances.remove("pred_masks")
            detections = instances_to_coco_json(instances, item["image_id"])
            if isinstance(masks, RleMasks):
                for detection, rle in zip(detections, masks.rles, strict=True):
                    counts = rle["counts"].decode("ascii")
                    detection["segmentation"] = {"size": rle["size"], "counts": counts}
            self._predictions.append({"image_id": item["image_id"], "instances": detections})

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        if img_ids is not None:
            raise ValueError(f"img_ids must be None: all images are evaluated, got {img_ids}")
        detections = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        category_ids = {index: id_ for id_, index in mapping.items()}
        for detection in detections:
            index = detection["category_id"]
            detection["category_id"] = category_ids[index] if mapping else index
        if self._output_dir:
            path = Path(self._output_dir, "coco_instances_results.json")
            path.write_text(json.dumps(detections), encoding="utf-8")
        if not self._do_evaluation:
            logger.info("%s has no annotations to evaluate against", self._metadata.json_file)
            return
        for task in sorted(self._tasks):
            start = time.perf_counter()
            found = None
            if detections:
                found = evaluate_coco(
                    self._metadata.json_file,
                    detections,
                    task,
                    evaluator=self.evaluator,
                    max_detections=self.max_detections,
                    sigmas=self._kpt_oks_sigmas,
                )
                seconds = time.perf_counter() - start
                logger.info(
                    "%s of %d detections by %s in %.2f s, at most %d for an image:\n%s",
                    task, len(detections), self.evaluator, seconds, self.max_detections,
                    found.summary.rstrip(),
                )  # fmt: skip
            self._results[task] = self._derive_coco_results(
                found, task, class_names=self._metadata.get("thing_classes")
            )
            self._results[task]["AR50"] = recall_at_50(found)
