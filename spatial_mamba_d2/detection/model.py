"""The detector of a configuration; Detectron2's registries build it."""

from __future__ import annotations

from detectron2.modeling import build_model

__all__ = ["build_model"]
