"""The classifier as one function of images, for export."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from spatial_mamba_d2.classification.predict import Predictor, class_words
from spatial_mamba_d2.export.exportable import (
    Difference,
    Exportable,
    Normalize,
    Outputs,
    Tolerance,
    relative_difference,
    wrong_decisions,
)
from spatial_mamba_d2.export.portable import portable_copy


class ExportableClassifier(nn.Module):
    """``uint8 Tensor[B, H, W, 3]``, RGB -> probability of each class, ``float32 [B, K]``.

    Args:
        model: a classifier in eval mode.
        mean, std: of the channels, in the unit of the pixels.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalize, self.model = Normalize(mean, std), model

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.model(self.normalize(image)).softmax(-1),)


def build_exportable(cfg: CfgNode) -> Exportable:
    """The classifier of ``cfg`` with ``MODEL.WEIGHTS``.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, or do not fit.
    """
    predictor = Predictor(cfg)
    statistics = tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)
    original = ExportableClassifier(predictor.model, *statistics).eval()
    crop_px = cfg.INPUT.CROP_PX

    def reference(image: Tensor) -> Outputs:
        with torch.no_grad():
            return {"probabilities": original(image)[0].numpy()}

    return Exportable(
        module=ExportableClassifier(portable_copy(predictor.model), *statistics).eval(),
        native=original,
        reference=reference,
        outputs=("probabilities",),
        takes_batches=True,
        num_channels=3,
        trace_px=(140, 210),
        check_px=((crop_px, crop_px), (131, 97), (64, 224), (33, 40), (160, 320)),
        compare=compare_probabilities,
        metadata={
            "task": "classification",
            "architecture": f"spatial_mamba_{cfg.MODEL.SPATIAL_MAMBA.VARIANT}",
            "classes": list(class_words(predictor.classes)),
            "channels": "RGB",
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "std": list(cfg.MODEL.PIXEL_STD),
            "resize": {"filter": "bicubic", "short_px": cfg.TEST.SHORT_PX, "crop_px": crop_px},
        },
    )


def compare_probabilities(
    expected: Outputs, found: Outputs, tolerance: Tolerance
) -> list[Difference]:
    """``probabilities`` of both, ``float32 [B, K]``, and the most probable classes."""
    mine, theirs = expected["probabilities"], found["probabilities"]
    apart = relative_difference(mine, theirs)
    differences = [Difference("probabilities, relative", apart, tolerance.relative)]
    if np.isfinite(apart):
        wrong, _ = wrong_decisions(mine, theirs.argmax(-1), tolerance.margin, -1)
        differences.append(Difference("other classes", wrong, 0))
    return differences
