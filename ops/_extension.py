"""The one place that defines operators, loads compiled kernels and decides which kernels run.

``SMD2_BACKEND`` is read once, at import:

* unset: compiled kernels where they exist for the device, else the eager ones;
* ``eager`` or ``reference``: those, even where compiled kernels exist;
* ``native``: compiled kernels, or an error with the reason why there are none: an ``ImportError``
  for the CPU, a ``RuntimeError`` at the call for another device.

Kernels for CPUs are compiled at installation, those for CUDA at their first call (see
:mod:`spatial_mamba_d2.ops.cuda`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spatial_mamba_d2.ops._precision import empty_output
from spatial_mamba_d2.ops.cuda import nvrtc

BACKENDS = ("reference", "eager", "native")
LIBRARY = torch.library.Library("spatial_mamba", "FRAGMENT")
#: the CPU kernels, for every Python and every PyTorch from that of oldest_torch() on
CPU_LIBRARY = Path(__file__).with_name("_C.so")
_PYTHON_KERNELS: dict[str, Callable] = {}
#: launch code of the operators that have CUDA kernels, by name
CUDA_KERNELS: dict[str, Callable] = {}
#: by the operators' names
_SCHEMAS = {
    line.partition("(")[0]: line
    for line in Path(__file__).with_name("schemas.h").read_text(encoding="utf-8").splitlines()
    if ") -> " in line
}


def _read_backend() -> str | None:
    name = os.environ.get("SMD2_BACKEND", "").strip().lower()
    if name and name not in BACKENDS:
        raise ImportError(f"SMD2_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name or None


INSTALL = "pip install --no-build-isolation . (in a checkout: python3 dev.py setup)"


def oldest_torch() -> tuple[int, int]:
    """The first version of PyTorch that the CPU kernels work with."""
    text = Path(__file__).with_name("stable.h").read_text(encoding="utf-8")
    major, minor = re.findall(r"\((\d+)ULL << ", text)
    return int(major), int(minor)


def _load_compiled() -> str | None:
    """Load the library of CPU kernels; return ``None``, or the reason why not and the fix."""
    if FORCED_BACKEND in ("reference", "eager"):
        return f"SMD2_BACKEND is {FORCED_BACKEND}"
    oldest = oldest_torch()
    if tuple(map(int, torch.__version__.split(".")[:2])) < oldest:
        needed = ".".join(map(str, oldest))
        return f"compiled kernels need PyTorch {needed} or newer, but this is {torch.__version__}"
    if not CPU_LIBRARY.exists():
        return (
            "no compiled kernels were built at install time. Install a C++ compiler and run: "
            f"{INSTALL}"
        )
    try:
        torch.ops.load_library(CPU_LIBRARY)
    except OSError as error:  # such as one for another platform
        return f"{CPU_LIBRARY.name} cannot be loaded ({error}). To rebuild it, run: {INSTALL}"
    return None


FORCED_BACKEND = _read_backend()
WHY_NOT_COMPILED = _load_compiled()
if WHY_NOT_COMPILED and FORCED_BACKEND == "native":
    raise ImportError(f"SMD2_BACKEND is native, but CPU kernels are missing: {WHY_NOT_COMPILED}")


@cache
def why_no_cuda() -> str | None:
    """Why CUDA kernels cannot be compiled here, or ``None``.

    What stands in the way of one GPU is found out at its first call.
    """
    if FORCED_BACKEND in ("reference", "eager"):
        return f"SMD2_BACKEND is {FORCED_BACKEND}"
    try:
        nvrtc.version()
    except nvrtc.UnavailableError as error:
        return str(error)
    return None


@cache
def _warn_slow(device_type: str, reason: str) -> None:
    """Log, once for each type of device and reason, that plain PyTorch is used there."""
    logging.getLogger(__name__).warning(
        "falling back to plain PyTorch operators%s (slower): %s",
        "" if device_type == "cpu" else f" on {device_type}",
        reason,
    )


def _on_fallback(device_type: str, reason: str) -> None:
    """Log a warning before plain PyTorch is used, or raise if compiled kernels are forced."""
    if FORCED_BACKEND == "native":
        raise RuntimeError(
            f"SMD2_BACKEND is native, but {device_type} kernels are missing: {reason}"
        )
    if FORCED_BACKEND is None:
        _warn_slow(device_type, reason)


if WHY_NOT_COMPILED and not FORCED_BACKEND:
    _warn_slow("cpu", WHY_NOT_COMPILED)


def status() -> str:
    """One line: which kernels run the operators, and why."""
    if FORCED_BACKEND in ("reference", "eager"):
        return f"{FORCED_BACKEND} on every device: {WHY_NOT_COMPILED}"
    native = [] if WHY_NOT_COMPILED else ["the CPU (compiled)"]
    if not why_no_cuda():
        major, minor = nvrtc.version()
        native.append(f"CUDA (compiled at the first call, by NVRTC {major}.{minor})")
    if not native:
        return f"eager on every device: {WHY_NOT_COMPILED}"
    others = f"the CPU: {WHY_NOT_COMPILED}" if WHY_NOT_COMPILED else "other devices"
    return f"native on {' and '.join(native)}, eager on {others}"


def define(
    name: str,
    *,
    fake: Callable,
    eager: Callable,
    reference: Callable,
    eager_backward: Callable | None = None,
    differentiable: Callable | None = None,
    cuda: Callable | None = None,
    cuda_backward: Callable | None = None,
    by_design: tuple[str, ...] = (),
) -> None:
    """Define ``spatial_mamba::<name>`` with all that needs no compiler.

    Args:
        name: of the schema in ``schemas.h``, where tensors come before other inputs.
        fake: computes the outputs' metadata from that of the inputs.
        eager: the fast implementation in plain PyTorch.
        reference: the readable one.
        eager_backward: ``(grad_output, *inputs) -> gradients`` of all tensors, in order. With it,
            the operator has one output and is differentiable; the backward pass is an operator
            ``<name>_backward`` of its own, and keeps nothing but the inputs.
        differentiable: plain PyTorch that autograd, forward-mode derivatives and ``torch.func`` see
            through, by default ``eager``. It computes what ``eager_backward`` does not: second
            derivatives, forward-mode derivatives, and everything under ``torch.func``.
        cuda: launches CUDA kernels, on checked inputs or after checks of its own. If it raises
            :class:`~.cuda.nvrtc.UnavailableError`, which it does before it launches anything, plain
            PyTorch is used.
        cuda_backward: the same for ``eager_backward``.
        by_design: device types where plain PyTorch is the intended implementation. Elsewhere, using
            it logs a warning, or raises if ``SMD2_BACKEND`` is ``native``.
    """
    is_reference = FORCED_BACKEND == "reference"
    _define(name, fake, reference if is_reference else eager, cuda, by_design)
    if eager_backward is None:
        return
    num_tensors = _SCHEMAS[name].partition(") ->")[0].count("Tensor ")

    def fake_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(empty_output(x) for x in inputs[:num_tensors])

    _define(
        f"{name}_backward",
        fake_backward,
        gradients_of(reference) if is_reference else eager_backward,
        cuda_backward,
        by_design,
    )
    plain = without_autocast(reference if is_reference else differentiable or eager)
    LIBRARY.impl(name, plain, "FuncTorchBatched")
    plain_backward = gradients_of(plain)
    backward_operator = getattr(torch.ops.spatial_mamba, f"{name}_backward")
    _register_derivatives(name, plain, plain_backward, backward_operator)
    if is_reference:  # its kernel needs autograd, which is off below the operator's own
        LIBRARY.impl(f"{name}_backward", plain_backward, "Autograd")
    else:
        second = gradients_of(plain_backward, num_outputs=num_tensors)
        _register_derivatives(f"{name}_backward", plain_backward, second, second)


def _register_derivatives(
    name: str, plain: Callable, plain_backward: Callable, backward: Callable
) -> None:
    """Register all derivatives of ``spatial_mamba::<name>``.

    Args:
        plain: computes the same as the operator in differentiable PyTorch.
        plain_backward: ``(*grad_outputs, *inputs) -> gradients`` of all tensors, of ``plain``.
        backward: the same, as fast as possible.
    """
    operator = getattr(torch.ops.spatial_mamba, name).default

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            ctx.save_for_backward(*tensors)
            ctx.others = inputs[len(tensors) :]
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
            inputs = (*ctx.saved_tensors, *ctx.others)
            is_batched = torch._C._are_functorch_transforms_active()  # by is_grads_batched
            gradients = (plain_backward if is_batched else backward)(*grad_outputs, *inputs)
            return None, *gradients, *(None for _ in ctx.others)

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if is_transformed(inputs):
            return plain(*inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Operator.apply(keyset, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    Operator.__name__ = Operator.__qualname__ = name  # in the names of autograd's nodes
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def is_transformed(inputs: tuple) -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode derivative is being computed."""
    if torch._C._are_functorch_transforms_active():
        return True
    # Looking at all tensors takes as long as starting a kernel.
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    )


def without_autocast(function: Callable) -> Callable:
    """``function`` with autocast off inside, which would change the precision of its operations."""

    @wraps(function)
    def called(first: Tensor, *rest: Any) -> Any:
        device = first.device.type
        if not torch.amp.is_autocast_available(device):
            return function(first, *rest)
        with torch.autocast(device, enabled=False):
            return function(first, *rest)

    return called


def _define(
    name: str,
    fake: Callable,
    function: Callable,
    cuda: Callable | None,
    by_design: tuple[str, ...],
) -> None:
    """Define one operator, implemented by ``function`` on all devices without compiled kernels.

    It is a CompositeExplicitAutograd kernel: a compiled one for a device takes precedence.
    """
    kernel = without_autocast(function)

    def fallback(first: Tensor, *rest: Any) -> Tensor | tuple[Tensor, ...]:
        device_type = first.device.type
        if device_type not in by_design:
            reason = "another backend was chosen"
            if device_type == "cpu":
                reason = WHY_NOT_COMPILED or reason
            elif device_type != "cuda":
                reason = "compiled kernels exist for CPU and CUDA only"
            _on_fallback(device_type, reason)
        return kernel(first, *rest)

    if not hasattr(torch.ops.spatial_mamba, name):  # the compiled library defines it as well
        LIBRARY.define(_SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spatial_mamba::{name}", fake, lib=LIBRARY)
    _PYTHON_KERNELS[name] = kernel
    if cuda:
        CUDA_KERNELS[name] = cuda
        if FORCED_BACKEND not in ("reference", "eager"):
            LIBRARY.impl(name, _cuda_or_plain(cuda, kernel), "CUDA")


def _cuda_or_plain(cuda: Callable, plain: Callable) -> Callable:
    """Call ``cuda``, or ``plain`` where CUDA kernels cannot run."""

    def called(*inputs: Any) -> Any:
        try:
            return cuda(*inputs)
        except nvrtc.UnavailableError as error:
            _on_fallback("cuda", str(error))
        return plain(*inputs)

    return called


def forbid_gradients(name: str, differentiable: str) -> None:
    """Make derivatives of ``spatial_mamba::<name>`` an error.

    Gradients are refused in the backward pass, or at the call if the operator works in place,
    because autograd does not record such operators; everything else is refused at the call.
    ``differentiable`` names, for the message, the operators to use instead.
    """
    operator = getattr(torch.ops.spatial_mamba, name).default
    message = f"{name} has no gradients; use {differentiable} where they are needed"

    def refuse(*inputs: Any) -> NoReturn:
        raise RuntimeError(message)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
            raise RuntimeError(message)

    def autograd(keyset: Any, *inputs: Any) -> Any:
        records = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        if is_transformed(inputs) or (records and operator._schema.is_mutable):
            raise RuntimeError(message)
        if records:
            return Operator.apply(keyset, *inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    LIBRARY.impl(name, refuse, "FuncTorchBatched")


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


def gradients_of(function: Callable, num_outputs: int = 1) -> Callable:
    """The gradients of ``function`` by autograd: ``(*grad_outputs, *inputs) -> gradients``.

    Inputs that are not tensors come after the tensors and have no gradient. If gradients are
    enabled, the results are differentiable themselves.
    """

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        grad_outputs, inputs = arguments[:num_outputs], arguments[num_outputs:]
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        others = inputs[len(tensors) :]
        if torch._C._are_functorch_transforms_active():
            outputs, pull_back = torch.func.vjp(  # type: ignore[misc]  # three if has_aux
                lambda *x: function(*x, *others), *tensors
            )
            return pull_back(grad_outputs if isinstance(outputs, tuple) else grad_outputs[0])
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            # Aliases, because one input may have been computed from another.
            aliases = [x.view_as(x) for x in tensors]
            leaves = [x if x.requires_grad else x.requires_grad_() for x in aliases]
            return torch.autograd.grad(
                function(*leaves, *others),
                leaves,
                grad_outputs,
                create_graph=create_graph,
                materialize_grads=True,
            )

    return backward
