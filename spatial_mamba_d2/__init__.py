"""Spatial-Mamba backbones for detection in Detectron2, semantic segmentation and classification.

Import the subpackage that you need: :mod:`spatial_mamba_d2.models`,
:mod:`spatial_mamba_d2.detection`, :mod:`spatial_mamba_d2.segmentation`, ...
"""

from spatial_mamba_d2.system import renamed

__version__ = "0.1.0"

renamed.install()
