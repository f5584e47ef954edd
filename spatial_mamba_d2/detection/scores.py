"""Which score decides about the best weights and an early end."""

from __future__ import annotations

from detectron2.config import CfgNode

from spatial_mamba_d2.detection.unused_keys import is_panoptic

_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR50")
_QUALITY = tuple(f"{kind}{group}" for kind in ("PQ", "SQ", "RQ") for group in ("", "_th", "_st"))
_METRICS = {
    "panoptic_seg": _QUALITY,
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl", "AR50"),
    "segm": _AP,
    "bbox": _AP,
}


def main_scores(cfg: CfgNode, suffix: str = "") -> list[str]:
    """Names of the score that decides, and of those that stand in where it is not computed.

    Args:
        suffix: of the keys of the results.

    Raises:
        ValueError: ``TEST.BEST_METRIC`` is no score of the detector.
    """
    asked = {
        "panoptic_seg": is_panoptic(cfg),
        "keypoints": cfg.MODEL.KEYPOINT_ON,
        "segm": cfg.MODEL.MASK_ON,
        "bbox": True,
    }
    tasks = [task for task, is_asked in asked.items() if is_asked]
    chosen = cfg.TEST.BEST_METRIC
    if chosen:
        task, _, metric = chosen.partition("/")
        if task not in tasks or not (metric in _METRICS[task] or metric.startswith("AP-")):
            examples = ", ".join(f"{task}/{_METRICS[task][0]}" for task in tasks)
            raise ValueError(
                f"TEST.BEST_METRIC must be a score of this detector, such as {examples} or "
                f"bbox/AP-<class>, got {chosen!r}"
            )
        scores = [(task, metric)]
    else:
        scores = [(task, _METRICS[task][0]) for task in tasks]
    if len(cfg.DATASETS.TEST) > 1:
        return [f"{cfg.DATASETS.TEST[0]}{suffix}/{task}/{metric}" for task, metric in scores]
    return [f"{task}{suffix}/{metric}" for task, metric in scores]
