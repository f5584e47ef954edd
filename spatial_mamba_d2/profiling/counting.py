"""Counts the operators that a model runs, their FLOPs, and the memory of their results.

Only shapes are needed, so a model on ``meta`` is counted on any machine in seconds.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from spatial_mamba_d2.profiling.flops import OFFICIAL_COUNTS
from spatial_mamba_d2.profiling.tracing import RealLayouts, RunningModule, own_storages


def _per_output(output: Tensor, *_: Any) -> int:
    return output.numel()


def _per_input(output: Any, x: Tensor, *_: Any) -> int:
    return x.numel()


#: Operators that only rename, move or draw data.
FREE_OPERATORS = frozenset(
    "_unsafe_view as_strided_ bernoulli_ cat clone detach empty new_empty new_zeros permute select "
    "slice split split_with_sizes squeeze stack t transpose unbind upsample_nearest2d view".split()
)
#: Name of an ATen or our operator -> its complete count from output and inputs.
COMPLETE_COUNTS: dict[str, Callable[..., int]] = {
    **OFFICIAL_COUNTS,
    **dict.fromkeys("add add_ div_ exp gelu mul neg relu relu_ silu".split(), _per_output),
    **dict.fromkeys(("mean", "sum"), _per_input),
    **dict.fromkeys(FREE_OPERATORS, lambda *_: 0),
    "native_group_norm": lambda output, x, *_: 5 * x.numel(),
    "max_pool2d_with_indices": lambda output, *_: output[0].numel(),
    "structure_aware_ssm": lambda output, u, *_: (7 + 25 + 2) * u.numel(),
    "depthwise_conv3x3": lambda output, *_: (9 + 1) * output.numel(),  # sum or SiLU
    "depthwise_conv3x3_stride2": lambda output, x, *_: (
        (9 + 1) * output.numel() + x.numel()
    ),  # ReLUs
    "gated_layer_norm": lambda output, *_: (5 + 2) * output.numel(),  # SiLU, product
}

Counts = dict[tuple[str, str], list[int]]  # (name of the module, operator) -> calls, FLOPs


def count_operators(
    model: nn.Module, run: Callable[[], Any], *, complete: bool
) -> tuple[Counts, int]:
    """Count what ``run()`` does with ``model`` without gradients, by the complete or official rule.

    Returns:
        ``(name of the module, operator)`` -> calls and FLOPs; the largest memory of activations
        alive at once, in bytes.

    Raises:
        NotImplementedError: no rule of the complete count covers an operator that was called.
    """
    recorder = _Recorder(model, complete)
    with torch.no_grad(), recorder.running, recorder:
        run()
    return dict(recorder.counts), recorder.peak_bytes


class _Recorder(RealLayouts):
    """Counts operators, and follows the memory of what they return."""

    def __init__(self, model: nn.Module, complete: bool):
        super().__init__()
        self.rules = COMPLETE_COUNTS if complete else OFFICIAL_COUNTS
        self.complete = complete
        self.running = RunningModule(model)
        self.counts: Counts = defaultdict(lambda: [0, 0])
        self.live_bytes = self.peak_bytes = 0
        self._storages = WeakIdKeyDictionary()
        for storage in own_storages(model):
            self._storages[storage] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if self.complete and name not in self.rules:
            raise NotImplementedError(f"no rule counts the operator {name}")
        if name in self.rules:
            count = self.counts[self.running.name, name]
            count[0] += 1
            count[1] += self.rules[name](output, *args)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._storages:
            return
        size = self._storages[storage] = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live_bytes -= size
