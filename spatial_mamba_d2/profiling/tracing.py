"""What is followed while a model runs: the running module, and the layout of its tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class RunningModule:
    """Knows which module of a model is running; a context manager that hooks into all of them."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._names = [""]
        self._hooks: list[Any] = []

    @property
    def name(self) -> str:
        """Its name in the model, ``""`` for the model itself and outside of it."""
        return self._names[-1]

    def __enter__(self) -> RunningModule:
        for name, module in self._model.named_modules():
            self._hooks += [
                module.register_forward_pre_hook(partial(self._start, name)),
                module.register_forward_hook(self._finish, always_call=True),
            ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _start(self, name: str, *_: Any) -> None:
        self._names.append(name)

    def _finish(self, *_: Any) -> None:
        self._names.pop()


class RealLayouts(TorchDispatchMode):
    """Gives convolutions on ``meta`` the layouts of CPUs and GPUs: channels-last in and out.

    On ``meta`` PyTorch forgets the layout of a slice, and the layers after it would make copies.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and output.is_meta:
            if args[0].stride(1) == 1:
                return torch.empty_like(output, memory_format=torch.channels_last)
        return output


def own_storages(model: nn.Module) -> list[torch.UntypedStorage]:
    """Storages of the parameters and buffers."""
    return [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
