"""The clock of the benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from spatial_mamba_d2.profiling.candidates import InContext
from spatial_mamba_d2.profiling.gpu import synchronize


def seconds_of(candidate: Callable[[], Any], device: str = "cpu", num_calls: int = 1) -> float:
    """Seconds of a call, the mean over ``num_calls``; without those of entering its context."""
    function, context = candidate, nullcontext
    if isinstance(candidate, InContext):
        function, context = candidate.function, candidate.context
    with context():
        start = time.perf_counter()
        for _ in range(num_calls):
            function()
        synchronize(device)
        return (time.perf_counter() - start) / num_calls
