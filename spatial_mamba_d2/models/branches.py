"""Residual branches, ``x + body(norm(x))``, with a backward pass of their own.

Autograd computes activations again for the weights' gradients, then their own gradients, then the
sums of these over tokens and over both ways that lead to x, and each step reads and writes entire
maps. One function for the whole branch knows what its neighbours need: GELU, norms and gate are
computed again in the pass that computes their gradients, both halves of a gradient are written
where they belong, and matrix products add to what is there.

It keeps what recipes keep (:mod:`.recompute`), calls the same modules in the forward pass, and
needs layers whose gradients it knows. Wherever one is replaced, has hooks, or recipes are not
possible either, the modules are called under autograd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spatial_mamba_d2.models.layers import LayerNorm, StochasticDepth
from spatial_mamba_d2.models.plain_layers import is_plain
from spatial_mamba_d2.models.pointwise import pointwise_grad_input, pointwise_grad_weight
from spatial_mamba_d2.models.recompute import autocast_state, is_recording, without_autocast
from spatial_mamba_d2.ops import layer_norm_gradients
from spatial_mamba_d2.ops._extension import gradients_of

Weights = Mapping[str, Tensor]


class Body(nn.Module):
    """A linear layer, an inner part, a linear layer; ``Tensor[B, H, W, C]`` -> the same shape.

    The inner part maps ``Tensor[B, H, W, I]`` to ``Tensor[B, H, W, O]``.
    """

    #: the linear layers' names
    first: ClassVar[str]
    last: ClassVar[str]
    #: the layers that :meth:`inner_gradients` differentiates, by name; linear layers and norms
    #: among them, the first and the last as well
    kinds: ClassVar[dict[str, type[nn.Module]]]
    #: names of the weights of these layers, and of others that are used as they are
    weights: ClassVar[tuple[str, ...]]

    def derived(self) -> dict[str, Tensor]:
        """Tensors that the inner part computes from other parameters."""
        return {}

    def inner(self, h: Tensor, derived: Weights) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and what :meth:`inner_gradients` needs besides ``h``."""
        raise NotImplementedError

    def inner_gradients(
        self, grad: Tensor, h: Tensor, kept: tuple[Tensor, ...], weights: Weights
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The gradient of ``h``, the output again, and the gradients of weights, by name.

        Args:
            grad: gradient of the output.
            h: as for :meth:`inner`.
            kept: what that returned.
            weights: those named in ``weights``, and the derived ones. The bias of the first layer
                has its gradient here, because ``h`` has.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x, self.derived())[0]

    def layers(self, x: Tensor, derived: Weights) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """``forward(x)``, what the inner part took, and what it keeps."""
        h = getattr(self, self.first)(x)
        y, kept = self.inner(h, derived)
        return getattr(self, self.last)(y), h, kept

    def has_known_layers(self) -> bool:
        """Whether all layers are those whose gradients are known."""
        return all(
            is_plain(layer := getattr(self, name), kind)
            and (getattr(layer, "bias", None) is not None) == (f"{name}.bias" in self.weights)
            for name, kind in self.kinds.items()
        )


def branch(x: Tensor, norm: nn.Module, body: nn.Module, depth: nn.Module) -> Tensor:
    """``depth(body(norm(x)), x)``: the sum of x and the branch, some of which are dropped."""
    if not (
        is_recording(x)
        and isinstance(body, Body)
        and isinstance(depth, StochasticDepth)
        and is_plain(norm, LayerNorm)
        and is_plain(body, type(body))
        and is_plain(depth, StochasticDepth)
        and body.has_known_layers()
    ):
        return depth(body(norm(x)), x)
    derived = body.derived()
    tensors = (*attrgetter("weight", "bias")(norm), *attrgetter(*body.weights)(body))
    factor = depth.factor(x)
    return _Branch.apply(norm, body, tuple(derived), factor, x, *tensors, *derived.values())


class _Parts(nn.Module):
    """The branch of which some weights are given."""

    body: Body

    def __init__(self, norm: LayerNorm, body: Body):
        super().__init__()
        self.norm, self.body = norm, body

    def forward(self, x: Tensor, factor: Tensor | None, derived: Weights) -> Tensor:
        return StochasticDepth.add(self.body.layers(self.norm(x), derived)[0], x, factor)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        norm: LayerNorm,
        body: Body,
        derived_names: tuple[str, ...],
        factor: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        num_derived = len(derived_names)
        derived = dict(zip(derived_names, tensors[len(tensors) - num_derived :], strict=True))
        y, h, kept = body.layers(norm(x), derived)
        ctx.norm, ctx.body = norm, body
        ctx.names = ("norm.weight", "norm.bias", *body.weights, *derived_names)
        ctx.num_derived = num_derived
        ctx.autocast = autocast_state(x.device.type)
        ctx.save_for_backward(x, factor, *tensors, h, *kept)
        return StochasticDepth.add(y, x, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        num_weights = len(ctx.names)
        x, factor, *saved = ctx.saved_tensors
        tensors, (h, *kept) = saved[:num_weights], saved[num_weights:]
        gradients: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(ctx, grad, x, factor, tensors)
        else:
            with without_autocast(x.device.type):
                gradients = _gradients(ctx, grad, x, factor, tensors, h, tuple(kept))
        return None, None, None, None, *gradients


def _gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    factor: Tensor | None,
    tensors: list[Tensor],
    h: Tensor,
    kept: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Of x and of all tensors, in order; ``None`` for some that nobody needs."""
    body: Body = ctx.body
    weights = dict(zip(ctx.names, tensors, strict=True))
    needed = dict(zip(ctx.names, ctx.needs_input_grad[5:], strict=True))
    first, last = f"{body.first}.weight", f"{body.last}.weight"
    grad_y = (grad if factor is None else grad * factor).to(h.dtype)
    grad_inner = pointwise_grad_input(grad_y, weights[last].to(h.dtype))
    grad_h, inner, gradients = body.inner_gradients(grad_inner, h, kept, weights)
    if needed[last]:
        gradients[last] = pointwise_grad_weight(grad_y, inner, weights[last])
    del inner
    if needed.get(f"{body.last}.bias"):
        gradients[f"{body.last}.bias"] = grad_y.sum((0, 1, 2))
    grad_norm = pointwise_grad_input(grad_h, weights[first].to(h.dtype))
    grad_x, normalized, *of_norm = layer_norm_gradients(
        grad_norm, grad, x, weights["norm.weight"], weights["norm.bias"], ctx.norm.eps
    )
    gradients["norm.weight"], gradients["norm.bias"] = of_norm
    if needed[first]:
        gradients[first] = pointwise_grad_weight(grad_h, normalized.to(h.dtype), weights[first])
    found = (gradients.get(name) if needed[name] else None for name in ctx.names)
    return [
        grad_x,
        *(g if g is None else g.to(w.dtype) for g, w in zip(found, tensors, strict=True)),
    ]


def _differentiable_gradients(
    ctx: Any, grad: Tensor, x: Tensor, factor: Tensor | None, tensors: list[Tensor]
) -> tuple[Tensor, ...]:
    """The same by autograd, which can compute their derivatives."""
    num_derived = ctx.num_derived
    parts = _Parts(ctx.norm, ctx.body)
    num_own = len(ctx.names) - num_derived
    own = [name if name.startswith("norm.") else f"body.{name}" for name in ctx.names[:num_own]]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        derived = dict(zip(ctx.names[num_own:], tensors[num_own:], strict=True))
        given = dict(zip(own, tensors[:num_own], strict=True))
        with ctx.autocast():
            return torch.func.functional_call(parts, given, (x, factor, derived))

    return gradients_of(function)(grad, x, *tensors)
