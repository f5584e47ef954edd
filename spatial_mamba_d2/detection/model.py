"""The detector of a configuration, built by Detectron2."""

from detectron2.modeling import build_model

__all__ = ["build_model"]
