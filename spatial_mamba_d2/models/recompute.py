"""Less memory in training for little time: cheap intermediates are computed twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def recompute(function: Callable[..., Result], *inputs: Tensor) -> Result:
    """``function(*inputs)``, of which training keeps nothing but the inputs.

    Backward runs it again, as far as it needs to: of a matrix product at the end of ``function`` it
    needs the operands, so the product itself is not run twice. Meant for a chain of cheap steps in
    front of such a product; it must not draw random numbers.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
