"""UPerNet as one function of images, for export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

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
from spatial_mamba_d2.models.upernet import argmax
from spatial_mamba_d2.segmentation.inference import Protocol, build_protocol, whole
from spatial_mamba_d2.segmentation.predict import Predictor

logger = logging.getLogger(__name__)
LABELS, PROBABILITIES = "labels", "probabilities"
OUTPUTS = (LABELS, PROBABILITIES)


class ExportableSegmentor(nn.Module):
    """``uint8 Tensor[B, H, W, C]`` -> predictions in the size of the image.

    Args:
        model: a UPerNet in eval mode.
        mean, std: of the channels, in the unit of the pixels.
        output: ``labels``: class indices, ``uint8 [B, H, W]``, or ``int32`` with more than 255;
            or ``probabilities`` of the classes, ``float32 [B, K, H, W]``.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], output: str):
        super().__init__()
        self.normalize, self.model, self.output = Normalize(mean, std), model, output

    def forward(self, image: Tensor) -> tuple[Tensor]:
        logits = whole(self.model, self.normalize(image))
        if self.output == PROBABILITIES:
            return (logits.softmax(1),)
        return (argmax(logits, 1),)


def build_exportable(cfg: CfgNode, output: str = LABELS) -> Exportable:
    """The UPerNet of ``cfg`` with ``MODEL.WEIGHTS``: the image as a whole, in one scale.

    Args:
        output: see :class:`ExportableSegmentor`.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, or do not fit; or ``output`` is
            unknown.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    predictor = Predictor(cfg)
    statistics = tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)
    original = ExportableSegmentor(predictor.model, *statistics, PROBABILITIES).eval()
    portable = portable_copy(predictor.model)

    def reference(image: Tensor) -> Outputs:
        with torch.no_grad():
            return {PROBABILITIES: original(image)[0].numpy()}

    return Exportable(
        module=ExportableSegmentor(portable, *statistics, output).eval(),
        native=ExportableSegmentor(predictor.model, *statistics, output).eval(),
        reference=reference,
        outputs=(output,),
        takes_batches=True,
        num_channels=cfg.INPUT.CHANNELS,
        # Its coarsest map, 5 x 7, has another size than the pooled maps.
        trace_px=(140, 210),
        check_px=((224, 224), (131, 97), (64, 224), (33, 40), (160, 320)),
        compare=compare_maps,
        metadata={
            "task": "segmentation",
            "architecture": "UPerNet",
            "classes": list(predictor.classes.names),
            "palette": [list(map(int, color)) for color in predictor.classes.palette],
            "channels": "RGB" if cfg.INPUT.CHANNELS == 3 else cfg.INPUT.CHANNELS,
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "std": list(cfg.MODEL.PIXEL_STD),
            "resize": {
                "filter": "bilinear",
                "short_px": cfg.INPUT.SHORT_PX,
                "long_px": cfg.INPUT.LONG_PX,
            },
            "protocol": str(_protocol(cfg)),
        },
    )


def _protocol(cfg: CfgNode) -> Protocol:
    """What a file does of the configuration's protocol: the image as a whole, once."""
    configured = build_protocol(cfg)
    protocol = replace(
        configured, name="ss", mode="whole", scales=(1.0,), scales_of="frame", flip=False
    )
    if protocol != replace(configured, name="ss"):
        logger.warning("protocol: the file predicts by %s, not by %s", protocol, configured)
    return protocol


def compare_maps(expected: Outputs, found: Outputs, tolerance: Tolerance) -> list[Difference]:
    """``probabilities`` of ``expected``, and these or ``labels`` of ``found``."""
    reference, differences = expected[PROBABILITIES], []
    labels = found.get(LABELS)
    if labels is None:
        probabilities = found[PROBABILITIES]
        apart = relative_difference(reference, probabilities)
        differences.append(Difference("probabilities, relative", apart, tolerance.relative))
        labels = probabilities.argmax(1)
    if labels.shape != (reference.shape[0], *reference.shape[2:]):
        return [*differences, Difference("labels of another shape", np.inf, 0)]
    wrong, _ = wrong_decisions(reference, labels, tolerance.margin, 1)
    return [*differences, Difference("other labels", wrong, 0)]
