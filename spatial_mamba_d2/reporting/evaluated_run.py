"""What a report is made of: models with what their evaluation gave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spatial_mamba_d2.evaluation import Evaluation
from spatial_mamba_d2.prediction.predictor import Predictor
from spatial_mamba_d2.reporting.test_sets import TestSet


@dataclass
class Run:
    """One model on its test set.

    Attributes:
        name: of the run.
        weights: the checkpoint.
        predictor: of it.
        tested: the images.
        protocol: how they are predicted, in words.
        evaluations: by what is evaluated: ``boxes`` and ``masks``, or the task.
    """

    name: str
    weights: Path
    predictor: Predictor
    tested: TestSet
    protocol: str
    evaluations: dict[str, Evaluation]
