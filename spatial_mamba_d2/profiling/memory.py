"""Memory: what autograd keeps for the backward pass, and what this process holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from spatial_mamba_d2.profiling.tracing import RealLayouts, RunningModule, own_storages
from spatial_mamba_d2.system.allocator import release_freed_memory


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of ``run()`` for its backward pass.

    Each storage counts once. Parameters and buffers of ``model`` do not count. Tensors may be on
    ``meta``.
    """
    return sum(saved_bytes_by_module(model, run).values())


def saved_bytes_by_module(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """The same by the module that saves a storage first.

    Returns:
        a module's name in ``model``, or ``""`` for the model itself and outside of it -> bytes.
    """
    # Identities tell storages apart, addresses do not: all empty ones have the same. The storages
    # stay alive in here, so that no identity is used twice.
    seen = {id(storage): storage for storage in own_storages(model)}
    found: dict[str, int] = defaultdict(int)
    running = RunningModule(model)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen[id(storage)] = storage
            found[running.name] += storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.enable_grad(), running, RealLayouts(), saved_tensors_hooks(pack, unpack):
        run()
    return dict(found)


def reset_peak_memory_mb() -> float | None:
    """Start to measure this process's peak anew; returns the MB that it holds now.

    Returns ``None`` where that is impossible: it takes Linux and a writable ``/proc``.
    """
    release_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_mb("VmRSS")


def peak_memory_mb() -> float:
    """The most MB that this process held since :func:`reset_peak_memory_mb`."""
    return _status_mb("VmHWM")


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1e3
