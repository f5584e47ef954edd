"""Classes of models that can only be used for inference, and what such models refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
import torch.fx
from torch import Tensor, nn

from spatial_mamba_d2.ops._extension import is_transformed

logger = logging.getLogger(__name__)

_NO_GRAPH = "cannot be traced, scripted or exported"


@cache
def inference_only(model_class: Any) -> type[nn.Module]:
    """A subclass of the model's own class, so that its methods and ``isinstance`` still work."""

    def reduce(self: Any, protocol: Any) -> tuple:  # pickle finds no class made at run time
        state = model_class.__reduce_ex__(self, protocol)[2:]
        return _new, (model_class,), *state

    name, bases = f"Optimized{model_class.__name__}", (InferenceOnly, model_class)
    return type(name, bases, {"__reduce_ex__": reduce, "__module__": __name__})


def _new(model_class: Any) -> nn.Module:
    """An optimised model without content, for pickle."""
    optimized = inference_only(model_class)
    return optimized.__new__(optimized)


def _refusal(module: nn.Module, reason: str) -> RuntimeError:
    return RuntimeError(
        f"{type(module).__name__} {reason}: its weights are folded and packed for inference; use "
        "the model that it was made from, then call optimize_for_inference again"
    )


def refuse_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if any(isinstance(x, torch.fx.Proxy) for x in inputs) or _is_captured():
        raise _refusal(module, _NO_GRAPH)
    if not torch.compiler.is_compiling() and is_transformed(inputs):
        raise _refusal(module, "has no gradients and no transforms of torch.func")
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise _refusal(module, "has no gradients")


def mention_autocast(module: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None) -> None:
    """Say once that autocast has no effect, unless it asks for what the products are in anyway."""
    device = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
    if torch.compiler.is_compiling() or not torch.amp.is_autocast_available(device):
        return
    if not torch.is_autocast_enabled(device):
        return
    wanted = torch.get_autocast_dtype(device)
    if wanted != dtype:
        _say_that_autocast_is_ignored(wanted)


@cache
def _say_that_autocast_is_ignored(wanted: torch.dtype) -> None:
    logger.warning(
        "optimised models ignore autocast: for %s, use optimize_for_inference(model, dtype=%s)",
        wanted,
        wanted,
    )


def _is_captured() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


class InferenceOnly(nn.Module):
    """Methods that raise ``RuntimeError`` on an optimised model and its parts."""

    def train(self, mode: bool = True) -> InferenceOnly:
        if mode:
            raise _refusal(self, "has no train mode")
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> InferenceOnly:
        if requires_grad:
            raise _refusal(self, "has no gradients")
        return super().requires_grad_(False)

    def __prepare_scriptable__(self) -> NoReturn:
        raise _refusal(self, _NO_GRAPH)

    def _load_from_state_dict(self, *args: Any) -> None:
        raise _refusal(self, "cannot load a state dict")

    def _save_to_state_dict(self, *args: Any) -> None:
        raise _refusal(self, "has no state dict")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InferenceOnly:
        for tensor in [*self.parameters(), *self.buffers()]:
            probe = fn(tensor.new_empty(0))
            if (probe.dtype, probe.device) != (tensor.dtype, tensor.device):
                raise _refusal(self, "cannot change its dtype or device")
        return super()._apply(fn, recurse)
