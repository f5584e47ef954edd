"""Predictors that compute faster, by :func:`~spatial_mamba_d2.models.optimize_for_inference`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from spatial_mamba_d2.models import optimize_for_inference, quantize_for_inference
from spatial_mamba_d2.prediction.predictor import Predictor, Source

DTYPES = ("float32", "bfloat16", "int8")
#: At most this many images calibrate 8 bits.
MAX_CALIBRATION = 32


def optimize_predictor(
    predictor: Predictor, dtype: str | None, calibration: Source | None = None
) -> None:
    """Replace a predictor's network by an optimised copy.

    Args:
        predictor: with a checkpoint's network, not one of an exported file.
        dtype: ``float32``: the same results within rounding errors. ``bfloat16``: as precise as
            autocast, and faster where the processor multiplies bfloat16. ``int8``: matrix products
            in 8 bits, on CPUs with VNNI; see
            :func:`~spatial_mamba_d2.models.quantize_for_inference`.
        calibration: images of the kind that will be predicted, for ``int8``, as the predictor takes
            them; the first 32 of them are used.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the processor cannot multiply in 8 bits.
    """
    if dtype not in DTYPES:
        raise ValueError(f"optimize must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if (dtype == "int8") != (calibration is not None):
        need = "some images" if dtype == "int8" else "left out"
        raise ValueError(f"calibration must be {need} for {dtype}, got {calibration!r}")
    owner: Any = predictor.model.predictor  # type: ignore[attr-defined]  # exported ones have none
    if dtype != "int8":
        owner.model = optimize_for_inference(owner.model, getattr(torch, dtype))
        return
    if isinstance(calibration, Iterator):
        calibration = list(islice(calibration, MAX_CALIBRATION))  # it is read several times
    original = owner.model

    def calibrate(network: nn.Module) -> None:
        owner.model = network
        results = predictor(calibration)  # type: ignore[arg-type]  # checked above
        if isinstance(results, Iterator):  # otherwise the result of one image
            for _ in islice(results, MAX_CALIBRATION):
                pass

    try:
        owner.model = quantize_for_inference(original, calibrate)
    except BaseException:
        owner.model = original
        raise
