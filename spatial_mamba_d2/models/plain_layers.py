"""Which layers may be computed inside a larger operator, without a call of their module."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every_module


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``layer`` does what ``kind.forward`` does with its weights, and no more.

    It is of exactly this type, not a subclass such as an adapter or a parametrised layer. Neither
    the layer nor the process (``torch.nn.modules.module.register_module_forward_hook``) has forward
    or backward hooks, its ``forward`` is not replaced, and its weights are ordinary tensors, not
    quantised or sharded ones.
    """
    return (
        type(layer) is kind
        and "forward" not in layer.__dict__
        and not (
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or every_module._global_forward_hooks
            or every_module._global_forward_pre_hooks
            or every_module._global_backward_hooks
            or every_module._global_backward_pre_hooks
        )
        and not any(hasattr(weight, "__tensor_flatten__") for weight in layer._parameters.values())
    )
