"""The one place that decides which kernels serve the operators, and loads the compiled ones.

``SMD2_BACKEND`` is read once, at import:

* unset: compiled kernels where they exist for the device, else the eager ones;
* ``eager`` / ``reference``: those, even where compiled kernels exist;
* ``native``: compiled kernels, or an ``ImportError`` that says why there are none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

BACKENDS = ("reference", "eager", "native")
LIBRARY = torch.library.Library("spatial_mamba", "FRAGMENT")
_PYTHON_KERNELS: dict[str, Callable] = {}


def _read_backend() -> str | None:
    name = os.environ.get("SMD2_BACKEND", "").strip().lower()
    if name and name not in BACKENDS:
        raise ImportError(f"SMD2_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name or None


def _load_compiled() -> str | None:
    """Load the compiled kernels; ``None``, or why there are none and what helps."""
    if FORCED_BACKEND in ("reference", "eager"):
        return f"SMD2_BACKEND is {FORCED_BACKEND}"
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    again = "pip install --no-build-isolation . (in a checkout: python3 dev.py setup)"
    if not libraries:
        return f"they were not compiled at installation; with a C++ compiler, {again} does it"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:  # mostly: compiled against another PyTorch
        return f"{libraries[0].name} cannot be loaded ({error}); {again} renews it"
    return None


FORCED_BACKEND = _read_backend()
WHY_NOT_COMPILED = _load_compiled()
WHY_NO_CUDA = "todo"
if WHY_NOT_COMPILED and FORCED_BACKEND == "native":
    raise ImportError(
        f"SMD2_BACKEND is native, but there are no compiled kernels: {WHY_NOT_COMPILED}"
    )
if WHY_NOT_COMPILED and not FORCED_BACKEND:
    logging.getLogger(__name__).warning(
        "operators run in plain PyTorch, which is slower, for there are no compiled kernels: %s",
        WHY_NOT_COMPILED,
    )


def status() -> str:
    """One line: which kernels serve the operators, and why."""
    if WHY_NOT_COMPILED is None:
        return "native on the CPU (compiled), eager on other devices"
    return f"{FORCED_BACKEND or 'eager'} on every device: {WHY_NOT_COMPILED}"


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

    _PYTHON_KERNELS[name] = kernel
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")


@contextmanager
def without_compiled_kernels() -> Iterator[None]:
    """Within it, plain PyTorch serves the CPU too: to compare both in one process."""
    override = torch.library.Library("spatial_mamba", "IMPL")
    for name, kernel in _PYTHON_KERNELS.items():
        override.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        override._destroy()


def gradients_of(reference: Callable) -> Callable:
    """The backward kernel of ``reference`` by autograd: ``(grad_output, *inputs) -> gradients``."""

    def backward(grad_output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            output = reference(*leaves)
        return torch.autograd.grad(output, leaves, grad_output)

    return backward
