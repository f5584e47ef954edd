"""The clock of the benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from spatial_mamba_d2.profiling.gpu import synchronize


@dataclass(frozen=True)
class InContext:
    """A call within a context, which is entered before the clock starts."""

    function: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]]

    def __call__(self) -> Any:
        with self.context():
            return self.function()


def call_seconds(call: Callable[[], Any], device: str = "cpu", num_calls: int = 1) -> float:
    """Seconds of a call, until a GPU is ready; the mean over ``num_calls``."""
    if isinstance(call, InContext):
        with call.context():
            return call_seconds(call.function, device, num_calls)
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / num_calls


def median_seconds(call: Callable[[], Any], device: str, rounds: int) -> float:
    """Of ``rounds`` calls, after one that is not timed; each waits for the GPU."""
    return statistics.median([call_seconds(call, device) for _ in range(rounds + 1)][1:])
