"""The one place that decides which kernels serve the operators, and loads the compiled ones.

``SMD2_BACKEND`` is read once, at import:

* unset: compiled kernels where they exist for the device, else the eager ones;
* ``eager`` / ``reference``: those, even where compiled kernels exist;
* ``native``: compiled kernels, or an error that says why there are none: an ``ImportError`` for
  the CPU, a ``RuntimeError`` at the call for another device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("reference", "eager", "native")
LIBRARY = torch.library.Library("spatial_mamba", "FRAGMENT")
_PYTHON_KERNELS: dict[str, Callable] = {}


def _read_backend() -> str | None:
    name = os.environ.get("SMD2_BACKEND", "").strip().lower()
    if name and name not in BACKENDS:
        raise ImportError(f"SMD2_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name or None


AGAIN = "pip install --no-build-isolation . (in a checkout: python3 dev.py setup)"


def _load_compiled(stem: str) -> str | None:
    """Load the library ``<stem>*.so``; ``None``, or why there is none and what helps."""
    if FORCED_BACKEND in ("reference", "eager"):
        return f"SMD2_BACKEND is {FORCED_BACKEND}"
    libraries = sorted(Path(__file__).parent.glob(f"{stem}*.so"))
    if not libraries:
        tool = "a C++ compiler" if stem == "_C" else "a CUDA toolkit"
        return f"they were not compiled at installation; with {tool}, {AGAIN} does it"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:  # mostly: compiled against another PyTorch
        return f"{libraries[0].name} cannot be loaded ({error}); {AGAIN} renews it"
    return None


FORCED_BACKEND = _read_backend()
WHY_NOT_COMPILED = _load_compiled("_C")
WHY_NO_CUDA = _load_compiled("_cuda")
if WHY_NOT_COMPILED and FORCED_BACKEND == "native":
    raise ImportError(
        f"SMD2_BACKEND is native, but there are no compiled kernels: {WHY_NOT_COMPILED}"
    )


def _why_not_on(device_type: str) -> str:
    reasons = {"cpu": WHY_NOT_COMPILED, "cuda": WHY_NO_CUDA}
    return reasons.get(device_type, "they are for CPU and CUDA") or "another choice was made"


@cache
def _tell_slow(device_type: str) -> None:
    """Say, once for each kind of device, that plain PyTorch serves it."""
    logging.getLogger(__name__).warning(
        "operators run in plain PyTorch%s, which is slower, for there are no compiled kernels: %s",
        "" if device_type == "cpu" else f" on {device_type}",
        _why_not_on(device_type),
    )


def _on_fallback(device_type: str) -> None:
    """Plain PyTorch is about to serve a device: say so, or refuse where kernels are forced."""
    if FORCED_BACKEND == "native":
        raise RuntimeError(
            f"SMD2_BACKEND is native, but there are no compiled kernels for {device_type}: "
            f"{_why_not_on(device_type)}"
        )
    if FORCED_BACKEND is None:
        _tell_slow(device_type)


if WHY_NOT_COMPILED and not FORCED_BACKEND:
    _tell_slow("cpu")


def status() -> str:
    """One line: which kernels serve the operators, and why."""
    if FORCED_BACKEND in ("reference", "eager"):
        return f"{FORCED_BACKEND} on every device: {WHY_NOT_COMPILED}"
    if WHY_NOT_COMPILED and WHY_NO_CUDA:
        return f"eager on every device: {WHY_NOT_COMPILED}"
    compiled = [] if WHY_NOT_COMPILED else ["the CPU"]
    compiled += [] if WHY_NO_CUDA else [f"CUDA ({torch.ops.spatial_mamba.cuda_architectures()})"]
    return f"native on {' and '.join(compiled)} (compiled), eager on other devices"


def define(schema: str) -> None:
    """Define ``spatial_mamba::<schema>`` so that it exists with nothing compiled."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_python(
    name: str,
    *,
    eager: Callable,
    reference: Callable,
    by_design: tuple[str, ...] = (),
) -> None:
    """Register the plain PyTorch kernel of ``spatial_mamba::<name>`` for all devices.

    But for those in ``by_design`` it is a substitute, and serving them is told or refused.

    It is a CompositeExplicitAutograd kernel: a compiled one for a device takes precedence. Autocast
    would reach the operations inside it, so it is off there: the kernel knows its own precision.
    """
    function = reference if FORCED_BACKEND == "reference" else eager

    def kernel(first: torch.Tensor, *rest: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    def fallback(first: torch.Tensor, *rest: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if first.device.type not in by_design:
            _on_fallback(first.device.type)
        return kernel(first, *rest)

    _PYTHON_KERNELS[name] = kernel
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")


@contextmanager
def without_compiled_kernels() -> Iterator[None]:
    """Within it, plain PyTorch serves CPU and CUDA too: to compare both in one process."""
    override = torch.library.Library("spatial_mamba", "IMPL")
    for name, kernel in _PYTHON_KERNELS.items():
        for key in ("CPU", "CUDA"):
            override.impl(name, kernel, key, allow_override=True)
    try:
        yield
    finally:
        override._destroy()


def gradients_of(reference: Callable) -> Callable:
    """The backward kernel of ``reference`` by autograd: ``(grad_output, *inputs) -> gradients``.

    Inputs that are no tensors stand behind the others and have no gradient.
    """

    def backward(grad_output: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in tensors]
            output = reference(*leaves, *inputs[len(leaves) :])
        return torch.autograd.grad(output, leaves, grad_output)

    return backward
