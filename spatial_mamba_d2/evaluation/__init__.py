"""What results on a data set say: scores with intervals, errors, calibration, worst images.

Nothing here runs a model or reads a file: it takes ground truth and predictions.
"""

from spatial_mamba_d2.evaluation.classes import evaluate_classes
from spatial_mamba_d2.evaluation.detection import evaluate_detections
from spatial_mamba_d2.evaluation.evaluation import Evaluation, compare
from spatial_mamba_d2.evaluation.label_maps import LabelMapScores

__all__ = ["Evaluation", "LabelMapScores", "compare", "evaluate_classes", "evaluate_detections"]
