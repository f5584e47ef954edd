"""What measurements on a GPU need: precision of float32, CUDA graphs, memory, times of launches.

The functions that need no GPU do the same on a CPU, so that everything built on them runs there.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from spatial_mamba_d2.ops._precision import set_tf32_of_convolutions
from spatial_mamba_d2.ops.cuda import kernels
from spatial_mamba_d2.ops.cuda.arguments import Launch


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Context in which float32 products and convolutions on a GPU use TF32, or do not.

    TF32 has 10 bits after the binary point, float32 has 23. PyTorch's default is TF32 for
    convolutions only.
    """
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    restore_convolutions = set_tf32_of_convolutions(tf32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        restore_convolutions()


def synchronize(device: str) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def graphed(call: Callable[[], Any], num_warm_ups: int = 3) -> Callable[[], Any]:
    """``call`` as a CUDA graph, which returns the same tensors each time, with new values.

    Args:
        call: a function without arguments that neither waits for the GPU nor depends on values.
        num_warm_ups: calls before the capture, which compile kernels, choose algorithms and
            allocate what stays.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(num_warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def peak_gpu_mb(call: Callable[[], Any]) -> float:
    """The most MB of GPU memory that PyTorch's tensors take during ``call``, above those before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


class _TimedDevice:
    """A :class:`~.kernels.Device` that notes the time of each launch."""

    def __init__(self, device: Any, is_cuda: bool, times: dict[str, list[Any]]):
        self.multiprocessors = device.multiprocessors
        self.shared_bytes = device.shared_bytes
        self._device, self._is_cuda, self._times = device, is_cuda, times

    def load(self, text: str, names: Sequence[str], title: str) -> list[Launch]:
        launches = self._device.load(text, names, title)
        return [self._timed(*pair) for pair in zip(names, launches, strict=True)]

    def _timed(self, name: str, launch: Launch) -> Launch:
        def call(*arguments: Any) -> None:
            if not self._is_cuda:
                begin = time.perf_counter()
                launch(*arguments)
                self._times[name].append(time.perf_counter() - begin)
                return
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch(*arguments)
            end.record()
            self._times[name].append((start, end))

        return call


@contextmanager
def launch_times(device: str) -> Iterator[dict[str, list[Any]]]:
    """Context that times every launch of our kernels on a device.

    Yields:
        a dictionary that :func:`seconds_of` reads: C++ name of a kernel -> its launches.
    """
    opener = kernels.OPENERS[device]
    times: dict[str, list[Any]] = defaultdict(list)
    kernels.OPENERS[device] = lambda x: _TimedDevice(opener(x), device == "cuda", times)
    kernels.unload()
    try:
        yield times
    finally:
        kernels.OPENERS[device] = opener
        kernels.unload()


def seconds_of(times: dict[str, list[Any]]) -> dict[str, float]:
    """The median of each kernel's launches."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

    def seconds(x: Any) -> float:
        return x[0].elapsed_time(x[1]) / 1e3 if isinstance(x, tuple) else x

    return {name: statistics.median(map(seconds, values)) for name, values in times.items()}
