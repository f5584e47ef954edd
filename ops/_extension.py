"""The one place that decides which kernels serve the operators.

``SMD2_BACKEND`` is read once, at import:

* unset: compiled kernels where they exist for the device, else the eager ones;
* ``eager`` / ``reference``: those, even where compiled kernels exist;
* ``native``: compiled kernels, or an ``ImportError`` that says why there are none.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

BACKENDS = ("reference", "eager", "native")
LIBRARY = torch.library.Library("spatial_mamba", "FRAGMENT")

_NOT_BUILT = (
    "no compiled kernels: this release has the pure PyTorch operators only, "
    "which run on every device that PyTorch supports"
)


def _read_backend() -> str | None:
    name = os.environ.get("SMD2_BACKEND", "").strip().lower()
    if not name:
        return None
    if name not in BACKENDS:
        raise ImportError(f"SMD2_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native":
        raise ImportError(f"SMD2_BACKEND=native, but there are {_NOT_BUILT}")
    return name


FORCED_BACKEND = _read_backend()


def status() -> str:
    """One line: which kernels serve the operators, and why."""
    if FORCED_BACKEND:
        return f"{FORCED_BACKEND} (forced by SMD2_BACKEND)"
    return f"eager ({_NOT_BUILT})"


def define(schema: str) -> None:
    """Define ``spatial_mamba::<schema>`` so that it exists with nothing compiled."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_python(name: str, *, eager: Callable, reference: Callable) -> None:
    """Register the plain PyTorch kernel of ``spatial_mamba::<name>`` for all devices.

    It is a CompositeExplicitAutograd kernel: a compiled one for a device takes precedence. Autocast
    would reach the operations inside it, so it is off there: the kernel knows its own precision.
    """
    function = reference if FORCED_BACKEND == "reference" else eager

    def kernel(first: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")


def gradients_of(reference: Callable) -> Callable:
    """The backward kernel of ``reference`` by autograd: ``(grad_output, *inputs) -> gradients``."""

    def backward(grad_output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            output = reference(*leaves)
        return torch.autograd.grad(output, leaves, grad_output)

    return backward
