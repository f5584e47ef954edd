"""The one place that defines operators, loads compiled kernels and decides which kernels run.

``SMD2_BACKEND`` is read once, at import:

* unset: compiled kernels where they exist for the device, else the eager ones;
* ``eager`` or ``reference``: those, even where compiled kernels exist;
* ``native``: compiled kernels, or an error with the reason why there are none: an ``ImportError``
  for the CPU, a ``RuntimeError`` at the call for another device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from spatial_mamba_d2.ops._precision import empty_output

BACKENDS = ("reference", "eager", "native")
LIBRARY = torch.library.Library("spatial_mamba", "FRAGMENT")
_PYTHON_KERNELS: dict[str, Callable] = {}


def _read_backend() -> str | None:
    name = os.environ.get("SMD2_BACKEND", "").strip().lower()
    if name and name not in BACKENDS:
        raise ImportError(f"SMD2_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name or None


INSTALL = "pip install --no-build-isolation . (in a checkout: python3 dev.py setup)"


def _load_compiled(stem: str) -> str | None:
    """Load the library ``<stem>*.so``; return ``None``, or the reason why not and the fix."""
    if FORCED_BACKEND in ("reference", "eager"):
        return f"SMD2_BACKEND is {FORCED_BACKEND}"
    libraries = sorted(Path(__file__).parent.glob(f"{stem}*.so"))
    if not libraries:
        kernels, tool = {
            "_C": ("compiled", "a C++ compiler"),
            "_cuda": ("CUDA", "a CUDA toolkit"),
        }[stem]
        return f"no {kernels} kernels were built at install time. Install {tool} and run: {INSTALL}"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:  # usually: compiled against another version of PyTorch
        return f"{libraries[0].name} cannot be loaded ({error}). To rebuild it, run: {INSTALL}"
    return None


FORCED_BACKEND = _read_backend()
WHY_NOT_COMPILED = _load_compiled("_C")
WHY_NO_CUDA = _load_compiled("_cuda")
if WHY_NOT_COMPILED and FORCED_BACKEND == "native":
    raise ImportError(f"SMD2_BACKEND is native, but CPU kernels are missing: {WHY_NOT_COMPILED}")


def _why_not_on(device_type: str) -> str:
    reasons = {"cpu": WHY_NOT_COMPILED, "cuda": WHY_NO_CUDA}
    return (
        reasons.get(device_type, "compiled kernels exist for CPU and CUDA only")
        or "another backend was chosen"
    )


@cache
def _warn_slow(device_type: str) -> None:
    """Log, once for each type of device, that plain PyTorch is used there."""
    logging.getLogger(__name__).warning(
        "falling back to plain PyTorch operators%s (slower): %s",
        "" if device_type == "cpu" else f" on {device_type}",
        _why_not_on(device_type),
    )


def _on_fallback(device_type: str) -> None:
    """Log a warning before plain PyTorch is used, or raise if compiled kernels are forced."""
    if FORCED_BACKEND == "native":
        raise RuntimeError(
            f"SMD2_BACKEND is native, but {device_type} kernels are missing: "
            f"{_why_not_on(device_type)}"
        )
    if FORCED_BACKEND is None:
        _warn_slow(device_type)


if WHY_NOT_COMPILED and not FORCED_BACKEND:
    _warn_slow("cpu")


def status() -> str:
    """One line: which kernels run the operators, and why."""
    if FORCED_BACKEND in ("reference", "eager"):
        return f"{FORCED_BACKEND} on every device: {WHY_NOT_COMPILED}"
    if WHY_NOT_COMPILED and WHY_NO_CUDA:
        return f"eager on every device: {WHY_NOT_COMPILED}"
    compiled = [] if WHY_NOT_COMPILED else ["the CPU"]
    compiled += [] if WHY_NO_CUDA else [f"CUDA ({torch.ops.spatial_mamba.cuda_architectures()})"]
    return f"native on {' and '.join(compiled)} (compiled), eager on other devices"


def define(
    schema: str,
    *,
    fake: Callable,
    eager: Callable,
    reference: Callable,
    eager_backward: Callable | None = None,
    by_design: tuple[str, ...] = (),
) -> None:
    """Define ``spatial_mamba::<schema>`` with all that needs no compiler.

    Args:
        schema: name, inputs and output; tensors come before other inputs.
        fake: computes the outputs' metadata from that of the inputs.
        eager: the fast implementation in plain PyTorch.
        reference: the readable one.
        eager_backward: ``(grad_output, *inputs) -> gradients`` of all tensors, in order. With it,
            the operator has one output and is differentiable; the backward pass is an operator
            ``<name>_backward`` of its own, and keeps nothing but the inputs.
        by_design: device types where plain PyTorch is the intended implementation. Elsewhere, using
            it logs a warning, or raises if ``SMD2_BACKEND`` is ``native``.
    """
    _define(schema, fake, reference if FORCED_BACKEND == "reference" else eager, by_design)
    if eager_backward is None:
        return
    name, _, inputs = schema.partition(") ->")[0].partition("(")
    num_tensors = sum(declaration.startswith("Tensor ") for declaration in inputs.split(", "))

    def fake_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(empty_output(x) for x in inputs[:num_tensors])

    _define(
        f"{name}_backward(Tensor grad_output, {inputs}) -> ({', '.join(['Tensor'] * num_tensors)})",
        fake_backward,
        gradients_of(reference) if FORCED_BACKEND == "reference" else eager_backward,
        by_design,
    )

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:num_tensors])
        ctx.others = inputs[num_tensors:]

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        operator = getattr(torch.ops.spatial_mamba, f"{name}_backward")
        gradients = operator(grad_output, *ctx.saved_tensors, *ctx.others)
        return *gradients, *(None for _ in ctx.others)

    torch.library.register_autograd(
        f"spatial_mamba::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def _define(schema: str, fake: Callable, function: Callable, by_design: tuple[str, ...]) -> None:
    """Define one operator, implemented by ``function`` on all devices without compiled kernels.

    It is a CompositeExplicitAutograd kernel: a compiled one for a device takes precedence. Autocast
    is off inside, where it would change the operations' precision: the function knows its own.
    """
    name = schema.partition("(")[0]

    def kernel(first: Tensor, *rest: Any) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    def fallback(first: Tensor, *rest: Any) -> Tensor | tuple[Tensor, ...]:
        if first.device.type not in by_design:
            _on_fallback(first.device.type)
        return kernel(first, *rest)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spatial_mamba::{name}", fake, lib=LIBRARY)
    _PYTHON_KERNELS[name] = kernel


def forbid_gradients(name: str, differentiable: str) -> None:
    """Make gradients of ``spatial_mamba::<name>`` an error: in the backward pass, or at the call.

    At the call if it works in place, because autograd does not record such operators.
    ``differentiable`` names, for the message, the operators to use instead.
    """
    operator = getattr(torch.ops.spatial_mamba, name).default
    message = f"{name} is for inference and has no gradients; use {differentiable} for training"

    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise RuntimeError(message)

    def in_place(*inputs: Any) -> None:
        tensors = (x for x in inputs if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise RuntimeError(message)
        with torch._C._AutoDispatchBelowAutograd():
            operator(*inputs)

    if operator._schema.is_mutable:
        LIBRARY.impl(name, in_place, "Autograd")
    else:
        torch.library.register_autograd(f"spatial_mamba::{name}", backward, lib=LIBRARY)


@contextmanager
def without_compiled_kernels() -> Iterator[None]:
    """Run plain PyTorch on CPU and CUDA within the context, to compare both in one process."""
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

    Inputs that are not tensors come after the tensors and have no gradient.
    """

    def backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in tensors]
            output = reference(*leaves, *inputs[len(leaves) :])
        return torch.autograd.grad(output, leaves, grad_output)

    return backward
