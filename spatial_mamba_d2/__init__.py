"""Spatial-Mamba backbones for detection in Detectron2, semantic segmentation and classification.

Import the room you need: :mod:`spatial_mamba_d2.models`, :mod:`spatial_mamba_d2.detection`, ...
"""

__version__ = "0.1.0"
