"""Predictions as data: result types of all tasks, images of any size, files in many formats.

>>> from spatial_mamba_d2.prediction import load_predictor
>>> predict = load_predictor("model_final.pth")
>>> predict("photo.jpg").to_pandas()
"""

from spatial_mamba_d2.prediction.loading import load_predictor
from spatial_mamba_d2.prediction.predictor import Predictor
from spatial_mamba_d2.prediction.results import ClassScores, Detections, LabelMap, Result

__all__ = ["ClassScores", "Detections", "LabelMap", "Predictor", "Result", "load_predictor"]
