"""Semantic segmentation with UPerNet on Lightning; needs neither Detectron2 nor OpenMMLab."""
